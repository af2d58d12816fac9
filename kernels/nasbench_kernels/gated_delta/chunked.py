"""The gated delta rule in chunks: within a chunk everything is matrix products, only the state goes chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chunked_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    scale: float | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `naive_gated_delta`; T is any size, the last chunk is padded with empty tokens.

    Computes in fp32. Decays enter only as exp of differences that are never positive, so strong decays underflow to
    zero instead of overflowing. README.md derives the equations, whose names the variables have.
    """
    batch, tokens, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    dtype = v.dtype
    chunk = min(chunk, tokens)
    q, k, v, g, beta = (_split(tensor.float(), chunk) for tensor in (q, k, v, g[..., None], beta[..., None]))
    q = q * scale

    total = g.cumsum(dim=-2)  # [B, H, N, C, 1]
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay = (total - total.mT).masked_fill(~lower, -torch.inf).exp()  # [B, H, N, C, C], row: later token
    keys_t = k.mT
    coupling = (beta * k @ keys_t * decay).tril(-1)
    scores = (q @ keys_t) * decay
    grown = total.exp()
    # U0 and W of (I + A) U = beta (V - exp(G) K S): one triangular solve serves both.
    right = torch.cat((beta * v, beta * grown * k), dim=-1)
    solved = torch.linalg.solve_triangular(coupling, right, upper=False, unitriangular=True)
    writes, reads = solved.split((v.shape[-1], key_dim), dim=-1)
    last = total[..., -1:, :]
    kept_keys = (k * (last - total).exp()).mT  # [B, H, N, K, C]
    kept_state = last.exp()

    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if state is None else state.float()
    states, updates = [], []
    for n in range(q.shape[2]):
        states.append(state)
        updates.append(writes[:, :, n] - reads[:, :, n] @ state)
        state = state * kept_state[:, :, n] + kept_keys[:, :, n] @ updates[-1]
    output = (q * grown) @ torch.stack(states, dim=2) + scores @ torch.stack(updates, dim=2)
    return output.flatten(2, 3)[:, :, :tokens].transpose(1, 2).to(dtype), state


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] -> [B, H, N, chunk, D], padded with zeros: a zero key, value, beta and log decay change nothing."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.transpose(1, 2).unflatten(2, (-1, chunk))
