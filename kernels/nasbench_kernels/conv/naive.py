"""The short convolution, token by token in fp32: the truth that fast forms are held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_short_conv(
    x: Tensor, weight: Tensor, conv_state: Tensor | None = None, reach: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y_t = SiLU(bias + sum_j weight_{t,j} * x_{t - W + 1 + j}) for every channel: tap W-1 is the current token.

    Args:
        x: [B, T, C].
        weight: [C, W], one for all tokens, or [B, T, C, W], one per token (arXiv 2508.15884).
        conv_state: the W-1 inputs before x, oldest first, [B, W-1, C]; zeros if None. It is not written.
        reach: [B, T, W] bool, which taps count; all if None. Tokens of other documents do not.
        bias: [C].

    Returns:
        [B, T, C] in x's dtype.
    """
    batch, tokens, channels = x.shape
    taps = weight.shape[-1]
    earlier = x.new_zeros(batch, taps - 1, channels) if conv_state is None else conv_state
    inputs = torch.cat((earlier, x), dim=1).float()
    outputs = []
    for t in range(tokens):
        seen = inputs[:, t : t + taps] if reach is None else inputs[:, t : t + taps] * reach[:, t, :, None]
        at = weight.float() if weight.dim() == 2 else weight[:, t].float()
        total = torch.stack([seen[:, j] * at[..., j] for j in range(taps)]).sum(0)
        outputs.append(F.silu(total if bias is None else total + bias.float()))
    return torch.stack(outputs, dim=1).to(x.dtype)
