"""A decode step of latent attention in fp32: what the kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_latent_attention(q: Tensor, q_rope: Tensor, latents: Tensor, positions: Tensor, scale: float) -> Tensor:
    """softmax(scale ([q, q_rope] . latents_j)) over the first positions[b] + 1 tokens j, times their latents.

    Args:
        q: absorbed queries, [H, B, L].
        q_rope: rotated queries, [B, H, R].
        latents: normed latents and rotated keys side by side, [B, N, L + R].

    Returns:
        [H, B, L] fp32.
    """
    query = torch.cat((q.transpose(0, 1), q_rope), -1).float()
    scores = query @ latents.float().mT * scale
    seen = torch.arange(latents.shape[1], device=q.device) <= positions[:, None]
    p = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return (p @ latents[..., : q.shape[-1]].float()).transpose(0, 1)
