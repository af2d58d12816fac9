"""Where the tokens of a pass stand, and what layers share in it.

Shapes: B sequences, T tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nasbench.model.documents import Documents
from nasbench.model.rotary import rotary_tables
from nasbench.model.spec import LayerShape, Rotary


class RotaryTables:
    """Rotary tables of positions 0..n-1, one pair per rotary embedding and device, grown by doubling.

    Decoders over the same weights share one object. Its tables are plain attributes, not buffers: a checkpoint has no
    place for them and a dtype change must not touch them.

    Args:
        max_context: positions beyond it are never made in advance.
    """

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context
        self._tables: dict[tuple[Rotary, torch.device], tuple[Tensor, Tensor]] = {}

    def upto(self, rotary: Rotary, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [at least `length`, D] fp32. Where frequencies depend on the length of the text, row p has
        those of a text of p + 1 tokens, as a decode step does."""
        known = self._tables.get((rotary, device))
        if known is None or known[0].shape[0] < length:
            size = min(max(256, 1 << (length - 1).bit_length()), max(length, self.max_context))
            # Tables made under inference_mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                known = rotary_tables(rotary, torch.arange(size, device=device))
            self._tables[rotary, device] = known
        return known

    def between(self, rotary: Rotary, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions start to end - 1 of a text of `end` tokens, each [end - start, D] fp32."""
        if rotary.varies:
            with torch.inference_mode(False), torch.no_grad():
                return rotary_tables(rotary, torch.arange(start, end, device=device), torch.tensor(end, device=device))
        cos, sin = self.upto(rotary, end, device)
        return cos[start:end], sin[start:end]


class SequenceMeta:
    """Where the T tokens of a forward pass stand. All sequences of the batch stand at the same place.

    Attributes:
        start: tokens that the cache already holds; 0 without a cache.
        documents: where documents begin in packed rows, for training and scoring without a cache; None where each row
            is one text. Positions count on through a row: only their differences matter to rotary embeddings.
        carried: what one layer leaves for later ones, by name.
    """

    def __init__(
        self, tables: RotaryTables, device: torch.device, start: int, tokens: int, documents: Documents | None = None
    ) -> None:
        self.start, self.tokens, self.documents = start, tokens, documents
        self.carried: dict[str, Any] = {}
        self._tables, self._device = tables, device
        self._made: dict[Rotary, tuple[Tensor, Tensor]] = {}

    def rotary(self, shape: LayerShape) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the tokens' positions, [T, D] fp32 (halves repeated, as rotate-half wants them)."""
        rotary = shape.rotary
        if rotary not in self._made:
            self._made[rotary] = self._tables.between(rotary, self.start, self.start + self.tokens, self._device)
        return self._made[rotary]


class StepMeta:
    """Where the one new token of every sequence of a decode step stands. Reading it costs no host synchronisation.

    Attributes:
        positions: [B] int64 on the device, 0-based position of the new token of each sequence.
        max_seqlen: host-side bound: no sequence looks at more than `max_seqlen` keys, the new one included.
        equal_lengths: every position is max_seqlen - 1, so that no mask over the keys is needed.
        carried: what one layer leaves for later ones, by name.
    """

    documents: None = None

    def __init__(self, tables: RotaryTables, positions: Tensor, max_seqlen: int, equal_lengths: bool) -> None:
        self.positions, self.max_seqlen, self.equal_lengths = positions, max_seqlen, equal_lengths
        self.carried: dict[str, Any] = {}
        self._tables = tables
        self._made: dict[Rotary, tuple[Tensor, Tensor]] = {}

    def rotary(self, shape: LayerShape) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the positions, [B, 1, D] fp32."""
        rotary = shape.rotary
        if rotary not in self._made:
            cos, sin = self._tables.upto(rotary, self.max_seqlen, self.positions.device)
            if self.equal_lengths:
                rows = (len(self.positions), 1, cos.shape[1])
                self._made[rotary] = cos[self.max_seqlen - 1].expand(rows), sin[self.max_seqlen - 1].expand(rows)
            else:
                self._made[rotary] = cos[self.positions, None], sin[self.positions, None]
        return self._made[rotary]


Meta = SequenceMeta | StepMeta
