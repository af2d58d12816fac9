"""Token shift of RWKV: what a block sees of the token before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.model.block import BlockCache
from nasbench.model.meta import Meta

PREVIOUS = "previous"
"""The cache's name of the last token's input, [B, C]."""


def shift_cache(batch: int, context: int, hidden: int, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
    """An empty cache that keeps nothing but the last input."""
    return BlockCache(context, {}, {PREVIOUS: torch.zeros(batch, hidden, device=device, dtype=dtype)})


def shifted(x: Tensor, meta: Meta, cache: BlockCache | None) -> Tensor:
    """x [B, T, C] -> each token's predecessor in its document, [B, T, C], or zeros. The cache moves on."""
    if cache is None:
        before = F.pad(x, (0, 0, 1, -1))
    else:
        last = cache.conv_state[PREVIOUS]
        before = torch.cat((last[:, None].to(x.dtype), x[:, :-1]), 1)
        last.copy_(x[:, -1])
    return before if meta.documents is None else before.masked_fill(meta.documents.first[..., None], 0.0)
