"""A decoder over packed rows: the forward pass of training and scoring, which keeps documents apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from nasbench.data.packing import Batch
from nasbench.model.block import Chunk, TokenMixer
from nasbench.model.decoder import Decoder
from nasbench.model.documents import Documents
from nasbench.supernet.fused_layers import embed, run_layer


def chunk_of(decoder: Decoder, batch: Batch) -> Chunk:
    """Where the tokens of packed rows stand. Raises UserError beyond the model's context."""
    chunk = decoder.chunk(0, batch.tokens.shape[1])
    return chunk if batch.ages is None else replace(chunk, documents=Documents(batch.ages))


def hidden_of(decoder: Decoder, batch: Batch) -> Tensor:
    """Final normalised hidden states [B, T, C]."""
    chunk, x = chunk_of(decoder, batch), embed(decoder, batch.tokens)
    for layer in decoder.layers:
        x = run_layer(layer, x, chunk)
    return decoder.model.norm(x)


def mixing(mixers: Iterable[TokenMixer]) -> list[str]:
    """The letters of the kinds that do not keep documents apart."""
    return sorted({str(mixer.config.kind) for mixer in mixers if not mixer.keeps_documents_apart})
