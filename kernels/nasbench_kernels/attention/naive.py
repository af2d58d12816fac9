"""Attention of a decode step in plain PyTorch, fp32: the truth that the kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_decode_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Arguments of `decode_attention` -> [B, H, D] fp32."""
    outputs = []
    for b, position in enumerate(positions.tolist()):
        seen = (x[b, :, : position + 1].float() for x in (keys, values))
        key, value = (x.repeat_interleave(q.shape[1] // keys.shape[1], 0) for x in seen)
        scores = torch.einsum("hd,hnd->hn", q[b].float(), key) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hn,hnd->hd", scores.softmax(-1), value))
    return torch.stack(outputs)
