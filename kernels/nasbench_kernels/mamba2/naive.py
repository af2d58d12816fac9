"""The recurrence of Mamba2 (arXiv 2405.21060), token by token in fp32: what fast forms are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_mamba2(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(decay_t) h_{t-1} + dt_t x_t b_t^T,  y_t = h_t c_t + skip x_t.

    Args:
        x: [B, T, H, P].
        dt: step sizes after softplus, [B, T, H].
        decay: log of the decay, dt * A, [B, T, H], not positive.
        b, c: [B, T, G, N]; consecutive H / G heads share a group.
        skip: D, [H].
        state: h before the first token, [B, H, P, N]; zeros if None. It is not written.

    Returns:
        Outputs [B, T, H, P] in x's dtype and the state after the last token, [B, H, P, N] fp32.
    """
    batch, tokens, heads, dim = x.shape
    dtype = x.dtype
    x, dt, decay = x.float(), dt.float(), decay.float()
    b, c = (part.float().repeat_interleave(heads // part.shape[2], 2) for part in (b, c))
    state = x.new_zeros(batch, heads, dim, b.shape[-1]) if state is None else state.float()
    outputs = []
    for t in range(tokens):
        written = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = state * decay[:, t].exp()[..., None, None] + written
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    y = torch.stack(outputs, dim=1)
    if skip is not None:
        y = y + skip.float()[:, None] * x
    return y.to(dtype), state
