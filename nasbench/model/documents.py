"""Where documents begin in packed sequences, and attention that stays inside them.

Several documents share a row of a batch; nothing may pass from one to the next. Everything follows from one number per
token, its age: how many tokens of its document stand before it in the row.

    attention        a key is seen if it is at most min(age, window - 1) tokens back
    recurrence       the state is forgotten at age 0: the log decay there is RESET_LOG_DECAY
    convolution      tap W - 1 - d, which reads d tokens back, counts if d <= age

Shapes never depend on where documents begin, so that a step on packed rows can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RESET_LOG_DECAY = -40.0
"""e^-40 = 4e-18 is nothing beside what a token writes, in fp32. Minus infinity would give NaN in differences of sums,
and a larger number would cost the precision of a chunk's other decays, which are summed with it."""
BLOCK = 1024
"""Queries whose mask is held at once: it grows with block x keys."""


class Documents:
    """The documents of a packed batch. What layers derive from the ages is made once and shared by all of them.

    Attributes:
        ages: [B, T] integers on the device.
    """

    def __init__(self, ages: Tensor) -> None:
        self.ages = ages
        self._made: dict[tuple[object, ...], Tensor] = {}

    @property
    def first(self) -> Tensor:
        """[B, T] bool: a document begins here."""
        if ("first",) not in self._made:
            self._made["first",] = self.ages == 0
        return self._made["first",]

    def reach(self, taps: int) -> Tensor:
        """[B, T, taps] bool: the input that each tap of a causal convolution reads is the token's own document's."""
        key = ("reach", taps)
        if key not in self._made:
            back = torch.arange(taps - 1, -1, -1, device=self.ages.device)
            self._made[key] = back <= self.ages[..., None]
        return self._made[key]

    def mask(self, queries: range, keys: range, window: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, queries, keys] of 0 and minus infinity, to be added to attention scores."""
        key = ("mask", queries, keys, window, dtype)
        if key not in self._made:
            device = self.ages.device
            query = torch.arange(queries.start, queries.stop, device=device)
            back = query[:, None] - torch.arange(keys.start, keys.stop, device=device)
            furthest = self.ages[:, queries.start : queries.stop, None].clamp(max=window - 1)
            seen = (back >= 0) & (back <= furthest)
            mask = torch.zeros(seen.shape, device=device, dtype=dtype)
            self._made[key] = mask.masked_fill_(~seen, -torch.inf)[:, None]
        return self._made[key]


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None) -> Tensor:
    """Causal attention within documents: q [B, H, T, D], k and v [B, Hkv, T, D] -> [B, H, T, D].

    Args:
        window: keys that a query sees at most, itself included; None for all.
    """
    tokens = q.shape[2]
    window = min(window or tokens, tokens)
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda and grouped:
        # With grouped heads and a mask only the form that writes all scores to memory is left on a GPU.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        grouped = False
    outputs = []
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        begin = max(0, first - window + 1)
        mask = documents.mask(range(first, last), range(begin, last), window, q.dtype)
        keys, values = k[:, :, begin:last], v[:, :, begin:last]
        outputs.append(
            F.scaled_dot_product_attention(q[:, :, first:last], keys, values, attn_mask=mask, enable_gqa=grouped)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
