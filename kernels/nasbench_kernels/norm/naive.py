"""The gated RMSNorm in plain PyTorch, fp32: the truth that its kernels are held to."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-5


def naive_gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of every head of x [N, H, V] times SiLU of gate [N, H * V] -> [N, H * V]."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), weight.float(), NORM_EPS)
    return normed.flatten(1) * F.silu(gate.float())
