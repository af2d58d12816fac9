"""Flash attention with windows and grouped heads (arXiv 2307.08691), by torch's own kernel on a GPU.

The public form, `scaled_dot_product_attention`, does not pass windows on, and with a mask in their place and grouped
heads it takes the form of attention that writes all scores to memory.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def has_flash(x: Tensor, width: int) -> bool:
    """Whether flash attention runs on the device and dtype of x with heads of `width`: half precision on an NVIDIA GPU
    from Ampere on, a multiple of 8 up to 256."""
    return x.is_cuda and x.element_size() == 2 and width % 8 == 0 and width <= 256 and _card_has_flash(x.device)


@cache
def _card_has_flash(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 8


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention of q [B, T, H, D], the last T of N positions, to k and v [B, N, Hkv, D] -> [B, T, H, D].

    Differentiable.

    Args:
        window: keys that a query sees, its own included; None for all before it.
    """
    queries, keys = q.shape[1], k.shape[1]
    sides: dict[str, int] = {}
    if window is not None and window < keys:
        sides = {"window_size_left": window - 1, "window_size_right": 0}
    return torch.ops.aten._flash_attention_forward(q, k, v, None, None, queries, keys, 0.0, True, False, **sides)[0]
