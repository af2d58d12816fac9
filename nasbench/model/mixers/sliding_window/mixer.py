"""W with weights: full attention's parameters over the last `window` keys, kept in a ring buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.model.block import BlockCache
from nasbench.model.documents import document_attention
from nasbench.model.meta import SequenceMeta
from nasbench.model.mixers.attention.flash import flash_attention, has_flash
from nasbench.model.mixers.attention.mixer import FullAttention, causal_attention
from nasbench.model.mixers.sliding_window.spec import SlidingWindowSpec


class SlidingWindow(FullAttention):
    """Position p lies in slot p % slots, slots = min(window, context); the decode step is full attention's own, since
    a ring that has wrapped is full and the order of keys does not matter to attention."""

    spec: SlidingWindowSpec

    def __init__(self, spec: SlidingWindowSpec) -> None:
        super().__init__(spec)
        self.window: int = spec.window

    def slots(self, context: int) -> int:
        return min(self.window, context)

    def slot(self, positions: Tensor, slots: int) -> Tensor:
        return positions % slots

    def attend(self, q: Tensor, k: Tensor, v: Tensor, meta: SequenceMeta, cache: BlockCache | None) -> Tensor:
        if meta.documents is not None:
            return document_attention(q, k, v, meta.documents, self.window)
        if cache is None:
            return windowed_attention(q, k, v, self.window)
        rings, tokens, end = (cache.state["keys"], cache.state["values"]), q.shape[2], meta.start + q.shape[2]
        slots = rings[0].shape[2]
        past = self.slot(torch.arange(max(0, meta.start - slots + 1), meta.start, device=q.device), slots)
        all_k, all_v = (
            torch.cat((ring[:, :, past].to(new.dtype), new), 2) for ring, new in zip(rings, (k, v), strict=True)
        )
        kept = min(tokens, slots)
        target = self.slot(torch.arange(end - kept, end, device=q.device), slots)
        for ring, new in zip(rings, (k, v), strict=True):
            ring.index_copy_(2, target, new[:, :, tokens - kept :].to(ring.dtype))
        return windowed_attention(q, all_k, all_v, self.window)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [B, H, T, D] of the last T of N positions, k and v [B, Hkv, N, D] -> [B, H, T, D].

    By flash attention where it runs. Else each block of `window` queries looks at the two windows of keys that it can
    see: time and memory grow with T x window, not with T x T, either way.
    """
    tokens, past = q.shape[2], k.shape[2] - q.shape[2]
    if k.shape[2] <= window:
        return causal_attention(q, k, v)
    if has_flash(q, q.shape[-1]):
        return flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window).transpose(1, 2)
    block = max(window, 64)
    outputs = []
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        begin = max(0, past + first - window + 1)
        query = torch.arange(past + first, past + last, device=q.device)[:, None]
        key = torch.arange(begin, past + last, device=q.device)
        mask = (key <= query) & (key > query - window)
        keys, values = k[:, :, begin : past + last], v[:, :, begin : past + last]
        outputs.append(
            F.scaled_dot_product_attention(q[:, :, first:last], keys, values, attn_mask=mask, enable_gqa=True)
        )
    return torch.cat(outputs, dim=2)
