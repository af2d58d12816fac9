"""Decode steps in plain PyTorch, fp32: the truth that the kernels' tests and benchmarks hold them to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench_kernels.dynamic_conv.naive import naive_dynamic_conv
from nasbench_kernels.gated_delta.naive import naive_gated_delta

if TYPE_CHECKING:
    from nasbench_kernels.decode.recurrent import RowLayout


def naive_recurrent_step(
    row: Tensor, layout: RowLayout, state: Tensor, a_log: Tensor, dt_bias: Tensor, norm_weight: Tensor,
    kernels: Tensor | None = None, history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Arguments of `recurrent_step` -> (output [B, H * V], state, history), all fp32; nothing is written in place."""
    _, heads, key_dim, value_dim = state.shape
    row = row.float()

    def part(at: int, size: int) -> Tensor:
        return row[:, at : at + heads * size].unflatten(1, (heads, size))

    q, k, v = part(layout.q, key_dim), part(layout.k, key_dim), part(layout.v, value_dim)
    if kernels is not None and history is not None:
        q, k, new = F.silu(q), F.silu(k), v.flatten(1)[:, None]
        v = naive_dynamic_conv(new, kernels.float()[:, None], history.float())[:, 0].unflatten(1, (heads, value_dim))
        history = torch.cat((history[:, 1:].float(), new), 1)
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    g = -a_log.exp() * F.softplus(part(layout.decay, 1)[..., 0] + dt_bias)
    beta = part(layout.beta, 1)[..., 0].sigmoid()
    mixed, state = naive_gated_delta(*(x[:, None] for x in (q, k, v, g, beta)), state)
    normed = F.rms_norm(mixed[:, 0], (value_dim,), norm_weight.float(), 1e-5)
    return (normed * F.silu(part(layout.gate, value_dim))).flatten(1), state, history


def naive_decode_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Arguments of `decode_attention` -> [B, H, D] fp32."""
    outputs = []
    for b, position in enumerate(positions.tolist()):
        seen = (x[b, :, : position + 1].float() for x in (keys, values))
        key, value = (x.repeat_interleave(q.shape[1] // keys.shape[1], 0) for x in seen)
        scores = torch.einsum("hd,hnd->hn", q[b].float(), key) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hn,hnd->hd", scores.softmax(-1), value))
    return torch.stack(outputs)
