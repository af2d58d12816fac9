"""Rotary embedding in plain PyTorch, fp32: the truth that its kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_rotary(row: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The first H heads of rows [B, T, P] rotated by the tables [T, D] of their positions -> [B, T, H, D]."""
    dim = cos.shape[-1]
    x = row[..., : heads * dim].float().unflatten(-1, (heads, dim))
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
