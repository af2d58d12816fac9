"""JetBlock's dynamic convolution (arXiv 2508.15884), token by token in fp32: the truth that fast forms are held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_dynamic_conv(x: Tensor, kernels: Tensor, history: Tensor | None = None) -> Tensor:
    """y_t = SiLU(sum_j kernels_{t,j} * x_{t - W + 1 + j}) for every channel: tap W-1 is the current token.

    Args:
        x: [B, T, C].
        kernels: one kernel per token and channel, [B, T, C, W].
        history: the W-1 inputs before x, oldest first, [B, W-1, C]; zeros if None. It is not written.

    Returns:
        [B, T, C] in x's dtype.
    """
    batch, tokens, channels = x.shape
    taps = kernels.shape[-1]
    earlier = x.new_zeros(batch, taps - 1, channels) if history is None else history
    inputs = torch.cat((earlier, x), dim=1).float()
    outputs = []
    for t in range(tokens):
        products = [inputs[:, t + j] * kernels[:, t, :, j].float() for j in range(taps)]
        outputs.append(F.silu(torch.stack(products).sum(0)))
    return torch.stack(outputs, dim=1).to(x.dtype)
