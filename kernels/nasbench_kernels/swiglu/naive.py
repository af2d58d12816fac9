"""SwiGLU in plain PyTorch, fp32: the truth that its kernels are held to."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def naive_swiglu(row: Tensor) -> Tensor:
    """SiLU(gate) * up of rows that hold gate and up side by side: [..., 2 F] -> [..., F]."""
    gate, up = row.float().chunk(2, -1)
    return F.silu(gate) * up
