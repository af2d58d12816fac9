"""Linear recurrences of one matrix per head, token by token in fp32: the truth for fast forms.

With the delta rule and a decay per head the gated delta rule (arXiv 2412.06464, equation 10), per channel Kimi Delta
Attention (arXiv 2510.26692, equation 1); without the rule retention (arXiv 2307.08621) and GLA (arXiv 2312.06635).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench_kernels.conv.naive import naive_short_conv
from nasbench_kernels.norm.naive import naive_gated_norm

L2_EPS = 1e-6


class RowLayout(NamedTuple):
    """Where the parts of a packed projection begin in its rows, in elements."""

    q: int
    k: int
    v: int
    gate: int
    decay: int
    beta: int


def naive_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reads and writes one matrix per head with every token.

    Args:
        q, k: [B, T, H, K]; keys of norm at most 1 for the delta rule.
        v: [B, T, H, V].
        g: log of the decay, [B, T, H] or, of each key channel, [B, T, H, K], not positive.
        beta: write gate of the delta rule, [B, T, H], in 0..1; None: every token adds k v^T.
        state: [B, H, K, V] before the first token; zeros if None. It is not written.
        scale: multiplies q; K ** -0.5 if None.

    Returns:
        Outputs [B, T, H, V] in v's dtype and the state after the last token, [B, H, K, V] fp32.
    """
    batch, tokens, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    dtype = v.dtype
    q, k, v, g = (tensor.float() for tensor in (q, k, v, g if g.dim() == 4 else g[..., None]))
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if state is None else state.float()
    outputs = []
    for t in range(tokens):
        state = state * g[:, t].exp()[..., None]
        write = v[:, t]
        if beta is not None:
            write = beta[:, t, :, None].float() * (write - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * write[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outputs, dim=1).to(dtype), state


def naive_recurrence_inputs(
    row: Tensor, a_log: Tensor, dt_bias: Tensor, heads: int, key_dim: int, decay_at: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns of rows [N, P], queries and keys first, H log decays and H betas from `decay_at` on -> q, k
    [N, H, K], g, beta [N, H]."""
    both = F.silu(row[:, : 2 * heads * key_dim].float()).unflatten(-1, (2 * heads, key_dim))
    both = both * (both.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()
    decay, beta = row[:, decay_at : decay_at + 2 * heads].float().split(heads, -1)
    return both[:, :heads], both[:, heads:], -a_log.exp() * F.softplus(decay + dt_bias), beta.sigmoid()


def naive_recurrent_step(
    row: Tensor, layout: RowLayout, state: Tensor, a_log: Tensor, dt_bias: Tensor, norm_weight: Tensor,
    conv_weight: Tensor | None = None, conv_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Arguments of `recurrent_step` -> (output [B, H * V], state, conv_state), all new and in fp32."""
    _, heads, key_dim, value_dim = state.shape
    row = row.float()

    def part(at: int, size: int) -> Tensor:
        return row[:, at : at + heads * size].unflatten(1, (heads, size))

    q, k, v = part(layout.q, key_dim), part(layout.k, key_dim), part(layout.v, value_dim)
    if conv_weight is not None and conv_state is not None:
        q, k, new = F.silu(q), F.silu(k), v.flatten(1)[:, None]
        v = naive_short_conv(new, conv_weight[:, None], conv_state).unflatten(2, (heads, value_dim))[:, 0]
        conv_state = torch.cat((conv_state[:, 1:].float(), new), 1)
    q, k = (x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt() for x in (q, k))
    g = -a_log.exp() * F.softplus(part(layout.decay, 1)[..., 0] + dt_bias)
    beta = part(layout.beta, 1)[..., 0].sigmoid()
    q, k, v, g, beta = (x[:, None] for x in (q, k, v, g, beta))
    mixed, state = naive_gated_delta(q, k, v, g, beta, state)
    gate = part(layout.gate, value_dim).flatten(1)
    return naive_gated_norm(mixed[:, 0], gate, norm_weight), state, conv_state
