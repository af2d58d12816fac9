"""The short convolution in plain PyTorch: over all tokens at once, and one decode step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def short_conv(
    x: Tensor, weight: Tensor, conv_state: Tensor | None = None, reach: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `naive_short_conv`; a conv_state is also replaced in place by the last W-1 inputs."""
    taps, tokens = weight.shape[-1], x.shape[1]
    inputs = F.pad(x, (0, 0, taps - 1, 0)) if conv_state is None else torch.cat((conv_state.to(x.dtype), x), dim=1)
    if conv_state is not None:
        conv_state.copy_(inputs[:, tokens:])
    if weight.dim() == 4:
        windows = inputs.unfold(1, taps, 1)  # [B, T, C, W], a view
        windows = windows if reach is None else windows * reach[:, :, None]
        mixed = (windows * weight).sum(-1)
        return F.silu(mixed if bias is None else mixed + bias)
    # One shifted product per tap: half the time of conv1d on a CPU, which wants channels before time.
    shifted = [inputs[:, j : j + tokens] for j in range(taps)]
    if reach is not None:
        shifted = [part * reach[..., j, None] for j, part in enumerate(shifted)]
    mixed = shifted[0] * weight[:, 0] if bias is None else torch.addcmul(bias, shifted[0], weight[:, 0])
    for j in range(1, taps):
        mixed = torch.addcmul(mixed, shifted[j], weight[:, j])
    return F.silu(mixed)


def short_conv_step(x: Tensor, weight: Tensor, conv_state: Tensor, bias: Tensor | None = None) -> Tensor:
    """One token: x [B, 1, C], weight [C, W] or [B, 1, C, W], conv_state [B, W-1, C], shifted in place -> [B, 1, C]."""
    inputs = torch.cat((conv_state.to(x.dtype), x), dim=1)
    conv_state.copy_(inputs[:, 1:])
    mixed = (inputs.mT[:, None] * weight).sum(-1) if weight.dim() == 4 else (inputs * weight.mT).sum(1, keepdim=True)
    return F.silu(mixed if bias is None else mixed + bias)
