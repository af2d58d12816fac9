"""The recurrences of `naive.py` in plain PyTorch: in chunks, whose states follow one another, and one decode step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 16
"""Tokens whose decays per channel are taken pair by pair."""


def chunked_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor | None = None,
    scale: float | None = None, chunk: int | None = None,
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
    q, k, v, g = (_split(tensor, chunk) for tensor in (q, k, v, g if g.dim() == 4 else g[..., None]))
    count = -(-tokens // chunk)

    total = g.cumsum(dim=1)  # [M, C, 1 or K], log decay from the chunk's start; M = B * H * N
    grown, last = total.exp(), total[:, -1:]
    writes, reads = v, None
    if beta is not None:
        beta = _split(beta[..., None], chunk)
        weighted = beta * k
        coupling = _scores(weighted, k, total).tril(-1)
        # The inverse first: LAPACK solves for C unit columns several times faster than for K + V dense ones.
        unit = torch.eye(chunk, device=q.device).expand_as(coupling)
        inverse = torch.linalg.solve_triangular(coupling, unit, upper=False, unitriangular=True)
        writes = torch.bmm(inverse, beta * v)
        reads = torch.bmm(inverse, weighted * grown).unflatten(0, (-1, count))
    kept_keys, kept_state = k * (last - total).exp(), last.exp().mT

    writes, kept_keys, kept_state = (x.unflatten(0, (-1, count)) for x in (writes, kept_keys, kept_state))
    state = q.new_zeros(batch, heads, key_dim, value_dim) if state is None else state.float()
    state = state.flatten(0, 1)  # [B * H, K, V]
    states, updates = [], []
    for n in range(count):
        states.append(state)
        update = writes[:, n]
        if reads is not None:
            update = torch.baddbmm(update, reads[:, n], state, alpha=-1)
        updates.append(update)
        state = torch.baddbmm(state * kept_state[:, n], kept_keys[:, n].mT, update)
    all_states, all_updates = (torch.stack(tensors, dim=1).flatten(0, 1) for tensors in (states, updates))
    output = torch.baddbmm(torch.bmm(q * grown, all_states), _scores(q, k, total), all_updates) * scale
    output = output.view(batch, heads, count * chunk, value_dim)[:, :, :tokens].transpose(1, 2)
    return output.to(dtype), state.unflatten(0, (batch, heads))


def _scores(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """q_i . exp(G_i - G_j) k_j for j <= i, zeros elsewhere: q, k [M, C, K], G [M, C, 1 or K] -> [M, C, C].

    A decay per channel stays inside the sum over channels. It is split at the first token of a block of rows: both
    parts are then at most 1 (arXiv 2312.06635, section 4.3). Within a block it is taken pair by pair.
    """
    chunk = q.shape[1]
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    if total.shape[-1] == 1:
        return torch.bmm(q, k.mT) * (total - total.mT).masked_fill(~lower, -torch.inf).exp()
    rows = []
    for begin in range(0, chunk, BLOCK):
        here, first = slice(begin, begin + BLOCK), total[:, begin : begin + 1]
        earlier = k[:, :begin] * (first - total[:, :begin]).exp()
        before = torch.bmm(q[:, here] * (total[:, here] - first).exp(), earlier.mT)
        apart = total[:, here, None] - total[:, None, here]
        apart = apart.masked_fill(~lower[here, here, None], -torch.inf).exp()
        within = (q[:, here, None] * k[:, None, here] * apart).sum(-1)
        rows.append(F.pad(torch.cat((before, within), -1), (0, chunk - begin - within.shape[-1])))
    return torch.cat(rows, 1)


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] -> fp32 [B * H * N, chunk, D], contiguous, padded with zeros: a token whose key, value, beta and
    log decay are zero changes nothing."""
    x = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.transpose(1, 2).reshape(-1, chunk, x.shape[-1])


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, scale: float | None = None
) -> Tensor:
    """One token: q, k [B, H, K], v [B, H, V], g [B, H] or [B, H, K], beta [B, H] or None, state [B, H, K, V]
    -> [B, H, V] fp32.

    The state is fp32, or bf16: then it is widened for the step and rounded when it is written.

    Reads the state once for key and query together: q^T S_t = exp(g) q^T S_{t-1} + (q . k) u, so that the output does
    not wait for the written state.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.float() * scale, k.float(), v.float()
    decay = (g if g.dim() == 3 else g[..., None]).float().exp()
    old = state.float()  # itself where it is fp32
    key_read, query_read = (torch.stack((k * decay, q * decay), dim=-2) @ old).unbind(-2)
    write = v if beta is None else (v - key_read) * beta.float()[..., None]
    old.mul_(decay[..., None]).addcmul_(k[..., None], write[..., None, :])
    if old is not state:
        state.copy_(old)
    return query_read + (q * k).sum(-1, keepdim=True) * write
