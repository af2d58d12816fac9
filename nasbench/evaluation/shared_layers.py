"""Placements that begin alike share the layers that they begin with: each is computed once, as long as memory lasts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from nasbench.data.packing import Batch
from nasbench.evaluation.reading import Reading
from nasbench.runtime.memory import free_bytes
from nasbench.spaces.placement import Placement
from nasbench.supernet.supernet import Supernet

SHARE = 0.1
"""Share of the free memory that hidden states may fill."""


class SharedLayers:
    """Hidden states behind the first layers of placements, the last used ones.

    Args:
        room_bytes: for all of them; None for a share of what is free. One placement's states are always kept.

    Attributes:
        asked, computed: layers of all placements and batches, and those of them that were computed.
    """

    def __init__(self, supernet: Supernet, room_bytes: float | None = None) -> None:
        self.supernet = supernet
        self.room_bytes = SHARE * free_bytes(supernet.teacher.device) if room_bytes is None else room_bytes
        self.asked = self.computed = 0
        self._kept: OrderedDict[tuple[object, Placement], tuple[Tensor, dict[str, Any]]] = OrderedDict()

    def hidden(
        self, placements: Sequence[Placement], text: object, batch: Batch, reading: Reading
    ) -> Iterator[tuple[Placement, Tensor]]:
        """Final hidden states [B, T, C] of each placement over a batch. Sorted placements share the most.

        Args:
            text: tells the batch from all others.
        """
        teacher, kept = self.supernet.teacher, self._kept
        embedded, meta = teacher.begin(batch.tokens, batch.documents)
        for placement in placements:
            depth = next((n for n in range(len(placement), 0, -1) if (text, placement[:n]) in kept), 0)
            for n in range(1, depth + 1):
                if (text, placement[:n]) in kept:
                    kept.move_to_end((text, placement[:n]))
            x, carried = kept[text, placement[:depth]] if depth else (embedded, {})
            meta.carried = dict(carried)
            with reading.kernels():
                for layer in range(depth, len(placement)):
                    x = self.supernet.layer(layer, placement[layer])(x, meta)
                    kept[text, placement[: layer + 1]] = x, dict(meta.carried)
            self.asked += len(placement)
            self.computed += len(placement) - depth
            most = max(len(placement) + 1, int(self.room_bytes // (x.numel() * x.element_size())))
            while len(kept) > most:
                kept.popitem(last=False)
            yield placement, teacher.model.norm(x)
