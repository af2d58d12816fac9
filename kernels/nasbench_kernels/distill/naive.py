"""Every function of this folder in plain PyTorch, fp32: the truth that the kernels' tests hold them to.

Shapes: N tokens, V vocabulary, H heads, K and D channels of a head, F inner channels of an MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

L2_EPS = 1e-6
NORM_EPS = 1e-5


def naive_divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] twice -> KL(teacher || student) and log sum exp of the student's logits, [N] each, and the gradient
    of the KL's sum by the student's logits, [N, V]."""
    log_p, log_q = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return kl, torch.logsumexp(student.float(), -1), log_p.exp() - log_q.exp()


def naive_rule_inputs(
    row: Tensor, a_log: Tensor, dt_bias: Tensor, heads: int, key_dim: int, decay_at: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns of rows [N, P], queries and keys first, H log decays and H writing strengths from `decay_at` on -> q, k
    [N, H, K], g, beta [N, H]."""
    both = F.silu(row[:, : 2 * heads * key_dim].float()).unflatten(-1, (2 * heads, key_dim))
    both = both * (both.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()
    decay, beta = row[:, decay_at : decay_at + 2 * heads].float().split(heads, -1)
    return both[:, :heads], both[:, heads:], -a_log.exp() * F.softplus(decay + dt_bias), beta.sigmoid()


def naive_gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of every head of x [N, H, V] times SiLU of gate [N, H * V] -> [N, H * V]."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), weight.float(), NORM_EPS)
    return normed.flatten(1) * F.silu(gate.float())


def naive_rotary(row: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The first H heads of rows [B, T, P] turned by the tables [T, D] of their positions -> [B, T, H, D]."""
    dim = cos.shape[-1]
    x = row[..., : heads * dim].float().unflatten(-1, (heads, dim))
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def naive_swiglu(row: Tensor) -> Tensor:
    """SiLU(gate) * up of rows that hold gate and up side by side: [..., 2 F] -> [..., F]."""
    gate, up = row.float().chunk(2, -1)
    return F.silu(gate) * up
