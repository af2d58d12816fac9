"""The gated delta rule in plain PyTorch: in chunks, where only the state goes chunk by chunk, and one decode step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chunked_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, scale: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same arguments and results as `naive_gated_delta`; T is any size, the last chunk is padded with empty tokens.

    `chunk` defaults to 64, on a CPU to 32, which is a third faster there. Computes in fp32. Decays enter only as exp
    of differences that are never positive, so strong decays underflow to zero instead of overflowing. README.md
    derives the equations.
    """
    batch, tokens, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    dtype, value_dim = v.dtype, v.shape[-1]
    chunk = min(chunk or (32 if q.device.type == "cpu" else 64), tokens)
    q, k, v, g, beta = (_split(tensor, chunk) for tensor in (q, k, v, g[..., None], beta[..., None]))
    count = -(-tokens // chunk)

    total = g.cumsum(dim=1)  # [M, C, 1], log decay from the chunk's start; M = B * H * N
    grown = total.exp()
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay = (total - total.mT).masked_fill(~lower, -torch.inf).exp()  # [M, C, C], row: the later token
    weighted = beta * k
    coupling = (torch.bmm(weighted, k.mT) * decay).tril(-1)
    # The inverse first: LAPACK solves for C unit columns several times faster than for K + V dense ones.
    unit = torch.eye(chunk, device=q.device).expand_as(coupling)
    inverse = torch.linalg.solve_triangular(coupling, unit, upper=False, unitriangular=True)
    writes = torch.bmm(inverse, beta * v)
    reads = torch.bmm(inverse, weighted * grown)
    last = total[:, -1:]
    kept_keys = k * (last - total).exp()
    kept_state = last.exp()

    steps = zip(*(x.unflatten(0, (-1, count)).unbind(1) for x in (writes, reads, kept_keys, kept_state)), strict=True)
    state = q.new_zeros(batch, heads, key_dim, value_dim) if state is None else state.float()
    state = state.flatten(0, 1)  # [B * H, K, V]
    states, updates = [], []
    for write, read, kept_key, kept in steps:
        states.append(state)
        updates.append(torch.baddbmm(write, read, state, alpha=-1))
        state = torch.baddbmm(state * kept, kept_key.mT, updates[-1])
    all_states, all_updates = (torch.stack(tensors, dim=1).flatten(0, 1) for tensors in (states, updates))
    scores = torch.bmm(q, k.mT) * decay
    output = torch.baddbmm(torch.bmm(q * grown, all_states), scores, all_updates) * scale
    output = output.view(batch, heads, count * chunk, value_dim)[:, :, :tokens].transpose(1, 2)
    return output.to(dtype), state.unflatten(0, (batch, heads))


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] -> fp32 [B * H * N, chunk, D], contiguous, padded with zeros: a token whose key, value, beta and
    log decay are zero changes nothing."""
    x = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.transpose(1, 2).reshape(-1, chunk, x.shape[-1])


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    """One token: q, k [B, H, K], v [B, H, V], g, beta [B, H], state [B, H, K, V] -> [B, H, V] fp32.

    The state is fp32, or bf16: then it is widened for the step and rounded when it is written.

    Reads the state once for key and query together: q^T S_t = exp(g) q^T S_{t-1} + (q . k) u, so that the output does
    not wait for the written state.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.float() * scale, k.float(), v.float()
    decay = g.float().exp()[..., None]
    old = state.float()  # itself where it is fp32
    key_read, query_read = (torch.stack((k, q), dim=-2) @ old * decay[..., None]).unbind(-2)
    write = (v - key_read) * beta.float()[..., None]
    old.mul_(decay[..., None]).addcmul_(k[..., None], write[..., None, :])
    if old is not state:
        state.copy_(old)
    return query_read + (q * k).sum(-1, keepdim=True) * write
