"""The static short convolution over all tokens at once, and its decode step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x: Tensor,
    weight: Tensor,
    history: Tensor | None = None,
    reach: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As `naive_causal_conv`; a history is also replaced in place by the last W-1 inputs."""
    taps, tokens = weight.shape[1], x.shape[1]
    inputs = F.pad(x, (0, 0, taps - 1, 0)) if history is None else torch.cat((history.to(x.dtype), x), dim=1)
    if history is not None:
        history.copy_(inputs[:, tokens:])
    # One shifted product per tap: half the time of conv1d on a CPU, which wants channels before time.
    shifted = [inputs[:, j : j + tokens] for j in range(taps)]
    if reach is not None:
        shifted = [part * reach[..., j, None] for j, part in enumerate(shifted)]
    mixed = shifted[0] * weight[:, 0] if bias is None else torch.addcmul(bias, shifted[0], weight[:, 0])
    for j in range(1, taps):
        mixed = torch.addcmul(mixed, shifted[j], weight[:, j])
    return F.silu(mixed)


def causal_conv_step(x: Tensor, weight: Tensor, history: Tensor, bias: Tensor | None = None) -> Tensor:
    """One token: x [B, 1, C], weight [C, W], bias [C], history [B, W-1, C], shifted in place -> [B, 1, C]."""
    inputs = torch.cat((history.to(x.dtype), x), dim=1)
    history.copy_(inputs[:, 1:])
    mixed = (inputs * weight.mT).sum(1, keepdim=True)
    return F.silu(mixed if bias is None else mixed + bias)
