"""A decoder over packed rows: the forward pass of training and scoring, which keeps documents apart."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from nasbench.data.packing import Batch
from nasbench.model.block import Block
from nasbench.model.decoder import Decoder
from nasbench.model.documents import Documents
from nasbench.model.meta import SequenceMeta


def _documents(batch: Batch) -> Documents | None:
    return None if batch.ages is None else Documents(batch.ages)


def meta_of(decoder: Decoder, batch: Batch) -> SequenceMeta:
    """Where the tokens of packed rows stand. Raises UserError beyond the model's context."""
    return decoder.sequence_meta(0, batch.tokens.shape[1], _documents(batch))


def hidden_of(decoder: Decoder, batch: Batch) -> Tensor:
    """Final normalised hidden states [B, T, C]."""
    return decoder.hidden_by_layer(batch.tokens, documents=_documents(batch))


def kinds_without_varlen(blocks: Iterable[Block]) -> list[str]:
    """The kinds that do not support packed documents."""
    return sorted({str(block.spec.kind) for block in blocks if not block.supports_packed_documents})
