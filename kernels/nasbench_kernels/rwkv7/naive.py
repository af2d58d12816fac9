"""The recurrence of RWKV7 (arXiv 2503.14456, equation 17), token by token in fp32: what fast forms are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_rwkv7(
    r: Tensor, decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = S_t^T r_t.

    Args:
        r, k: receptance and replacement key, [B, T, H, K].
        decay: log of the decay of each channel, [B, T, H, K], not positive.
        v: [B, T, H, V].
        a, b: the removal key with its sign turned, and what is added along it: -kappa and kappa * rate, [B, T, H, K].
        state: S before the first token, [B, H, K, V]; zeros if None. It is not written.

    Returns:
        Outputs [B, T, H, V] in v's dtype and the state after the last token, [B, H, K, V] fp32.
    """
    dtype = v.dtype
    r, decay, k, v, a, b = (part.float() for part in (r, decay, k, v, a, b))
    state = r.new_zeros(*r[:, 0].shape, v.shape[-1]) if state is None else state.float()
    outputs = []
    for t in range(r.shape[1]):
        removed = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        written = b[:, t, :, :, None] * removed[:, :, None] + k[:, t, :, :, None] * v[:, t, :, None]
        state = state * decay[:, t].exp()[..., None] + written
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
    return torch.stack(outputs, dim=1).to(dtype), state
