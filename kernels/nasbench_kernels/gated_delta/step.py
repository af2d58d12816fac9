"""One decode step of the gated delta rule, writing the state in place."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    """One token: q, k [B, H, K], v [B, H, V], g, beta [B, H], state [B, H, K, V] fp32 -> [B, H, V] fp32.

    Reads the state once for key and query together: q^T S_t = exp(g) q^T S_{t-1} + (q . k) u, so that the output does
    not wait for the written state.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.float() * scale, k.float(), v.float()
    decay = g.float().exp()[..., None]
    key_read, query_read = (torch.stack((k, q), dim=-2) @ state * decay[..., None]).unbind(-2)
    write = (v - key_read) * beta.float()[..., None]
    state.mul_(decay[..., None]).addcmul_(k[..., None], write[..., None, :])
    return query_read + (q * k).sum(-1, keepdim=True) * write
