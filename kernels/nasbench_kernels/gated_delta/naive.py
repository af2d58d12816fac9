"""The gated delta rule (arXiv 2412.06464, equation 10), token by token in fp32: what fast forms are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Reads and writes one matrix per head with every token.

    Args:
        q, k: [B, T, H, K]; keys of norm at most 1.
        v: [B, T, H, V].
        g: log of the decay, [B, T, H], not positive.
        beta: writing strength, [B, T, H], in 0..1.
        state: [B, H, K, V] before the first token; zeros if None. It is not written.
        scale: multiplies q; K ** -0.5 if None.

    Returns:
        Outputs [B, T, H, V] in v's dtype and the state after the last token, [B, H, K, V] fp32.
    """
    batch, tokens, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    dtype = v.dtype
    q, k, v, g, beta = (tensor.float() for tensor in (q, k, v, g, beta))
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if state is None else state.float()
    outputs = []
    for t in range(tokens):
        state = state * g[:, t].exp()[..., None, None]
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        write = beta[:, t, :, None] * (v[:, t] - read)
        state = state + k[:, t, :, :, None] * write[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outputs, dim=1).to(dtype), state
