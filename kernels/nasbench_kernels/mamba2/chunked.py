"""The recurrence of Mamba2 in chunks: within a chunk everything is matrix products, only the state goes on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chunked_mamba2(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `naive_mamba2`, differentiable; T is any size.

    Computes in fp32. Decays enter only as exp of sums that are never positive, so strong decays underflow to zero.
    The last chunk is padded with tokens of zero step size and decay, which change nothing. README.md derives the
    equations.
    """
    batch, tokens, heads, dim = x.shape
    groups, size = b.shape[2:]
    each, dtype, inputs = heads // groups, x.dtype, x
    chunk = min(chunk, tokens)
    b, c = (_split(part, chunk).transpose(2, 3) for part in (b, c))  # [B, M, G, C, N]; M chunks
    moved = _split(x.float() * dt.float()[..., None], chunk).unflatten(3, (groups, each))  # [B, M, C, G, R, P]
    total = _split(decay, chunk).cumsum(2).unflatten(3, (groups, each))  # [B, M, C, G, R], from the chunk's start
    last = total[:, :, -1:]

    # What each chunk adds to the state, one product for the heads of a group.
    kept = (moved * (last - total).exp()[..., None]).permute(0, 1, 3, 4, 5, 2).flatten(3, 4)  # [B, M, G, R P, C]
    added = (kept @ b).unflatten(3, (each, dim)).flatten(2, 3)  # [B, M, H, P, N]
    factor = last.exp().flatten(2)[..., None, None]  # [B, M, H, 1, 1]
    state = x.new_zeros(batch, heads, dim, size, dtype=torch.float32) if state is None else state.float()
    starts = []
    for step, grown in zip(factor.unbind(1), added.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(grown, state, step)
    before = torch.stack(starts, 1).unflatten(2, (groups, each)).flatten(3, 4)  # [B, M, G, R P, N]

    y = (c @ before.mT).unflatten(4, (each, dim)).transpose(2, 3) * total.exp()[..., None]  # [B, M, C, G, R, P]
    gates = total.permute(0, 1, 3, 4, 2)  # [B, M, G, R, C]
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    within = (gates[..., :, None] - gates[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    scores = (c @ b.mT)[:, :, :, None] * within  # [B, M, G, R, C, C], row: the later token
    y = y + (scores @ moved.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)
    y = y.reshape(batch, -1, heads, dim)[:, :tokens]
    if skip is not None:
        y = y + skip.float()[:, None] * inputs.float()
    return y.to(dtype), state


def mamba2_step(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, state: Tensor
) -> Tensor:
    """One token: x [B, H, P], dt and decay [B, H], b and c [B, G, N]; the state [B, H, P, N], fp32 or bf16, is written
    in place -> [B, H, P] fp32."""
    groups = b.shape[1]
    x, dt, b, c = x.float(), dt.float(), b.float(), c.float()
    new = state.float().mul_(decay.float().exp()[..., None, None])  # itself where it is fp32
    by_group = new.unflatten(1, (groups, -1))  # [B, G, R, P, N], a view
    by_group.addcmul_((x * dt[..., None]).unflatten(1, (groups, -1))[..., None], b[:, :, None, None])
    if new.dtype != state.dtype:
        state.copy_(new)
    y = (by_group.flatten(2, 3) @ c[..., None]).view(x.shape)
    return y if skip is None else torch.addcmul(y, skip.float()[:, None], x)


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, ...] -> fp32 [B, M, chunk, ...], padded with zeros."""
    padding = [0, 0] * (x.dim() - 2) + [0, -x.shape[1] % chunk]
    return F.pad(x.float(), padding).unflatten(1, (-1, chunk))
