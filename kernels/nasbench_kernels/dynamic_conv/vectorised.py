"""JetBlock's dynamic convolution over all tokens at once, and its decode step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dynamic_conv(x: Tensor, kernels: Tensor, history: Tensor | None = None) -> Tensor:
    """As `naive_dynamic_conv`; a history is also replaced in place by the last W-1 inputs."""
    taps, tokens = kernels.shape[-1], x.shape[1]
    inputs = F.pad(x, (0, 0, taps - 1, 0)) if history is None else torch.cat((history.to(x.dtype), x), dim=1)
    if history is not None:
        history.copy_(inputs[:, tokens:])
    windows = inputs.unfold(1, taps, 1)  # [B, T, C, W], a view
    return F.silu((windows * kernels).sum(-1))


def dynamic_conv_step(x: Tensor, kernels: Tensor, history: Tensor) -> Tensor:
    """One token: x [B, 1, C], kernels [B, 1, C, W], history [B, W-1, C], shifted in place -> [B, 1, C]."""
    inputs = torch.cat((history.to(x.dtype), x), dim=1)
    history.copy_(inputs[:, 1:])
    return F.silu((inputs.mT[:, None] * kernels).sum(-1))
