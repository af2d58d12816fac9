"""A with weights: grouped-query attention over a static cache. The sliding window shares it all but the cache size."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.blocks.base import MixerConfig
from nasbench.blocks.full_attention import FullAttentionConfig
from nasbench.blocks.mixer import Chunk, MixerCache, Step, TokenMixer
from nasbench.blocks.rotary import apply_rotary


class FullAttention(TokenMixer):
    """Causal attention of H query heads over Hkv shared key/value heads, rotary positions, optional query/key norms."""

    config_class: ClassVar[type[MixerConfig]] = FullAttentionConfig

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        shape = config.shape
        self.head_dim = shape.head_dim
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.group = shape.num_heads // shape.num_kv_heads
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.rms_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.rms_eps) if shape.qk_norm else nn.Identity()

    def slots(self, context: int) -> int:
        """Keys that a cache for `context` tokens holds."""
        return context

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> MixerCache:
        """Keys and values, [B, Hkv, slots, D] each."""
        size = (batch, self.num_kv_heads, self.slots(context), self.head_dim)
        state = {name: torch.zeros(size, device=device, dtype=dtype) for name in ("keys", "values")}
        return MixerCache(context, state)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D], k and v [B, Hkv, T, D], q and k normed and rotated.

        cos and sin broadcast to [B, heads, T, D].
        """
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def merge(self, mixed: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, T, C]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, chunk: Chunk, cache: MixerCache | None = None) -> Tensor:
        q, k, v = self.project(x, chunk.cos, chunk.sin)
        if cache is not None:
            end = chunk.start + x.shape[1]
            keys, values = cache.state["keys"], cache.state["values"]
            keys[:, :, chunk.start : end] = k
            values[:, :, chunk.start : end] = v
            if chunk.start:
                k, v = keys[:, :, :end], values[:, :, :end]
        return self.merge(causal_attention(q, k, v))

    def step(self, x: Tensor, step: Step, cache: MixerCache) -> Tensor:
        q, k, v = self.project(x, step.cos[:, None], step.sin[:, None])
        keys, values = cache.state["keys"], cache.state["values"]
        slots = keys.shape[2]
        index = (step.positions % slots)[:, None, None, None].expand_as(k)
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        seen = min(step.span, slots)
        # Slot s holds a key of this sequence from its position s on, in a ring as in a plain cache.
        mask = None if step.uniform else torch.arange(seen, device=x.device) <= step.positions[:, None]
        mixed = decode_attention(q[:, :, 0], keys[:, :, :seen], values[:, :, :seen], mask)
        return self.o_proj(mixed.flatten(1)[:, None])

    @classmethod
    def init_from_attention(cls, config: MixerConfig, attention: FullAttention) -> Self:
        """A copy of every weight."""
        weight = attention.q_proj.weight
        mixer = cls(config).to(device=weight.device, dtype=weight.dtype)
        mixer.load_state_dict(attention.state_dict())
        return mixer


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, T, D] of the last T of N positions, k and v [B, Hkv, N, D] -> [B, H, T, D]."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query per head over all keys: q [B, H, D], k and v [B, Hkv, N, D], mask [B, N] or None -> [B, H, D].

    The query heads of a group stand as rows of one product, so that its keys and values are read once and never
    repeated in memory.
    """
    batch, kv_heads, _, dim = k.shape
    grouped = q.view(batch, kv_heads, -1, dim)
    mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=None if mask is None else mask[:, None, None])
    return mixed.reshape(q.shape)
