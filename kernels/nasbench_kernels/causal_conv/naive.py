"""The static short convolution, token by token in fp32: the truth that fast forms are held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_causal_conv(
    x: Tensor,
    weight: Tensor,
    history: Tensor | None = None,
    reach: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y_t = SiLU(bias + sum_j weight_j * x_{t - W + 1 + j}) for every channel: tap W-1 is the current token.

    Args:
        x: [B, T, C].
        weight: [C, W].
        history: the W-1 inputs before x, oldest first, [B, W-1, C]; zeros if None. It is not written.
        reach: [B, T, W] bool, which taps count; all if None. Tokens of other documents do not.
        bias: [C].

    Returns:
        [B, T, C] in x's dtype.
    """
    batch, tokens, channels = x.shape
    taps = weight.shape[1]
    earlier = x.new_zeros(batch, taps - 1, channels) if history is None else history
    inputs = torch.cat((earlier, x), dim=1).float()
    outputs = []
    for t in range(tokens):
        seen = inputs[:, t : t + taps] if reach is None else inputs[:, t : t + taps] * reach[:, t, :, None]
        products = [seen[:, j] * weight[:, j].float() for j in range(taps)]
        total = torch.stack(products).sum(0)
        outputs.append(F.silu(total if bias is None else total + bias.float()))
    return torch.stack(outputs, dim=1).to(x.dtype)
