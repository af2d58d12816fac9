"""The recurrence of RWKV7 in plain PyTorch: in chunks, where only the state goes from one to the next, and one step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chunked_rwkv7(
    r: Tensor, decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None,
    first: Tensor | None = None, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments and results of `naive_rwkv7`, differentiable; T is any size. README.md derives the equations.

    Computes in fp32. Decays between two tokens of a chunk are products of two factors, each relative to the chunk's
    middle: a log decay above -1, as RWKV7's, keeps both below e^32.

    Args:
        first: [B, T] bool, tokens before which the state is forgotten.
        chunk: default 64, on a CPU 32.
    """
    batch, tokens, heads, key_dim = r.shape
    dtype = v.dtype
    chunk = min(chunk or (32 if r.device.type == "cpu" else 64), tokens)
    r, decay, k, v, a, b = (_split(part, chunk) for part in (r, decay, k, v, a, b))  # [M, C, .]; M = B * H * N
    count = -(-tokens // chunk)

    total = decay.cumsum(1)  # [M, C, K], log decay from the chunk's start, the token's own included
    last, middle = total[:, -1:], total[:, chunk // 2, None]
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=r.device).tril()
    begun, kept_r, kept_a, to_end = total.exp(), r, a, (last - total).exp()
    if first is not None:
        document = F.pad(first, (0, count * chunk - tokens)).unflatten(1, (count, chunk)).cumsum(2)
        document = document[:, None].expand(-1, heads, -1, -1).flatten(0, 2)[..., None]  # [M, C, 1], from 0 on
        lower = lower & (document == document.mT)
        ongoing = document == 0  # tokens of the document that the state is of
        kept_r, kept_a, to_end = r * ongoing, a * ongoing, to_end * (document == document[:, -1:])
        last = last.masked_fill(~ongoing[:, -1:], -torch.inf)
    nearer = (total - middle).exp()
    into, reads = (middle - total).exp(), torch.cat((a * (nearer * (-decay).exp()), r * nearer), 1)  # a reads before
    strict = lower & ~torch.eye(chunk, dtype=torch.bool, device=r.device)
    by_write, by_removal = (
        torch.bmm(reads, (part * into).mT) * torch.cat((strict, lower), -2) for part in (k, b)
    )  # [M, 2 C, C]: what is read for the removal, then for the output
    unit = torch.eye(chunk, device=r.device).expand(len(r), -1, -1)
    inverse = torch.linalg.solve_triangular(unit - by_removal[:, :chunk], unit, upper=False, unitriangular=True)
    own = torch.bmm(inverse, torch.bmm(by_write[:, :chunk], v))
    of_state = torch.bmm(inverse, kept_a * (total - decay).exp())
    added = torch.bmm((k * to_end).mT, v)
    removal_keys, kept_state = b * to_end, last.exp().mT

    parts = (own, of_state, added, removal_keys, kept_state)
    state = r.new_zeros(batch, heads, key_dim, v.shape[-1]) if state is None else state.float()
    state = state.flatten(0, 1)  # [B * H, K, V]
    states, removals = [], []
    for fresh, read, grown, key, kept in zip(*(x.unflatten(0, (-1, count)).unbind(1) for x in parts), strict=True):
        states.append(state)
        removals.append(torch.baddbmm(fresh, read, state))
        state = torch.baddbmm(state * kept + grown, key.mT, removals[-1])
    before, removed = (torch.stack(tensors, dim=1).flatten(0, 1) for tensors in (states, removals))
    output = torch.bmm(kept_r * begun, before) + torch.bmm(by_write[:, chunk:], v)
    output = torch.baddbmm(output, by_removal[:, chunk:], removed)
    output = output.view(batch, heads, count * chunk, -1)[:, :, :tokens].transpose(1, 2)
    return output.to(dtype), state.unflatten(0, (batch, heads))


def rwkv7_step(r: Tensor, decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """One token: r, decay, k, a, b [B, H, K], v [B, H, V]; the state [B, H, K, V], fp32 or bf16, is written in place
    -> [B, H, V] fp32."""
    r, decay, k, v, a, b = (part.float() for part in (r, decay, k, v, a, b))
    new = state.float()  # itself where it is fp32
    removed = a[..., None, :] @ new
    new = new.mul_(decay.exp()[..., None]).addcmul_(b[..., None], removed).addcmul_(k[..., None], v[..., None, :])
    if new.dtype != state.dtype:
        state.copy_(new)
    return (r[..., None, :] @ new)[..., 0, :]


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] -> fp32 [B * H * N, chunk, D], padded with zeros: tokens that change nothing."""
    x = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.transpose(1, 2).reshape(-1, chunk, x.shape[-1])
