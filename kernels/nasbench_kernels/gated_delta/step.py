"""One decode step of the gated delta rule, writing the state in place."""

from __future__ import annotations

import torch
from torch import Tensor


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
