"""A with weights: grouped-query attention over a static cache. The sliding window shares it all but the cache size."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import Chunk, MixerCache, Step, TokenMixer
from nasbench.model.documents import document_attention
from nasbench.model.mixers.attention.spec import FullAttentionSpec
from nasbench.model.packed import StackedProjections
from nasbench.model.rotary import apply_rotary
from nasbench.model.spec import MixerSpec


class FullAttention(TokenMixer):
    """Causal attention of H query heads over Hkv shared key/value heads, rotary positions, optional query/key norms."""

    config_class: ClassVar[type[MixerSpec]] = FullAttentionSpec
    keeps_documents_apart: ClassVar[bool] = True

    def __init__(self, config: MixerSpec) -> None:
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
        self.stacked = StackedProjections((self.q_proj, self.k_proj, self.v_proj))

    def slots(self, context: int) -> int:
        """Keys that a cache for `context` tokens holds."""
        return context

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> MixerCache:
        """Keys and values, [B, Hkv, slots, D] each."""
        size = (batch, self.num_kv_heads, self.slots(context), self.head_dim)
        state = {name: torch.zeros(size, device=device, dtype=dtype) for name in ("keys", "values")}
        return MixerCache(context, state)

    def slot(self, positions: Tensor, slots: int) -> Tensor:
        """Which of a cache's slots holds the key of each position."""
        return positions

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C] -> q [B, H, T, D], k and v [B, Hkv, T, D], q and k normed and rotated.

        cos and sin broadcast to [B, T, D].
        """
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.stacked(x))
        # Queries and keys are rotated together: half as many small operations in a decode step.
        rotated = apply_rotary(torch.cat((self.q_norm(q), self.k_norm(k)), dim=2), cos[..., None, :], sin[..., None, :])
        q, k = rotated.transpose(1, 2).split((self.num_heads, self.num_kv_heads), dim=1)
        return q, k, v.transpose(1, 2)

    def project_chunk(self, x: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """`project` at a chunk's positions; rotated in one launch where kernels run and nothing stands between the
        projections and the rotation: torch's own eight took 3.9 of the 8.6 s that an H200 asked SmolLM2-135M's
        benchmarks for."""
        if not (fused.usable(x) and isinstance(self.q_norm, nn.Identity)):
            return self.project(x, chunk.cos, chunk.sin)
        row = F.linear(x, *self.stacked.matrices())
        turned = fused.ops().rotary(row, chunk.cos, chunk.sin, self.num_heads, self.num_kv_heads)
        q, k, v = (part.transpose(1, 2) for part in turned)
        return q, k, v

    def merge(self, mixed: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, T, C]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, chunk: Chunk, cache: MixerCache | None = None) -> Tensor:
        q, k, v = self.project_chunk(x, chunk)
        if chunk.documents is not None:
            return self.merge(document_attention(q, k, v, chunk.documents))
        if cache is not None:
            end = chunk.start + x.shape[1]
            keys, values = cache.state["keys"], cache.state["values"]
            keys[:, :, chunk.start : end] = k
            values[:, :, chunk.start : end] = v
            if chunk.start:
                k, v = keys[:, :, :end], values[:, :, :end]
        return self.merge(causal_attention(q, k, v))

    def fused_mix(self, row: Tensor, step: Step, cache: MixerCache) -> Tensor:
        """A decode step between the projections: stacked rows [B, (H + 2 Hkv) D] -> [B, H D], by Triton kernels."""
        keys, values = cache.state["keys"], cache.state["values"]
        norms = (self.q_norm.weight, self.k_norm.weight) if isinstance(self.q_norm, nn.RMSNorm) else (None, None)
        q = fused.ops().rotary_write(
            row, step.positions, step.cos[:, 0], step.sin[:, 0], keys, values, self.num_heads, *norms,
            eps=self.config.shape.rms_eps,
        )  # fmt: skip
        return fused.ops().decode_attention(q, keys, values, step.positions, step.span).flatten(1)

    def step(self, x: Tensor, step: Step, cache: MixerCache) -> Tensor:
        if fused.usable(x):
            mixed = fused.mix(self, x[:, 0], step, cache)
            return fused.linear(mixed, self.o_proj.weight)[:, None]
        q, k, v = self.project(x, step.cos, step.sin)
        keys, values = cache.state["keys"], cache.state["values"]
        slots = keys.shape[2]
        slot = self.slot(step.positions, slots)
        for stored, new in ((keys, k), (values, v)):
            write_slots(stored, new.to(stored.dtype), slot, step.uniform)
        seen = min(step.span, slots)
        # Slot s holds a key of this sequence from its position s on, in a ring as in a plain cache.
        mask = None if step.uniform else torch.arange(seen, device=x.device) <= step.positions[:, None]
        return self.merge(decode_attention(q, keys[:, :, :seen], values[:, :, :seen], mask))

    @classmethod
    def init_from_attention(cls, config: MixerSpec, attention: FullAttention) -> Self:
        """A copy of every weight."""
        weight = attention.q_proj.weight
        mixer = cls(config).to(device=weight.device, dtype=weight.dtype)
        mixer.load_state_dict(attention.state_dict())
        return mixer


def write_slots(stored: Tensor, new: Tensor, slot: Tensor, uniform: bool) -> None:
    """stored[b, :, slot[b]] = new[b, :, 0] in place: stored [B, Hkv, N, D], new [B, Hkv, 1, D], slot [B] on the device.

    `scatter_` would copy the whole of `stored` on a CPU.
    """
    if uniform:
        stored.index_copy_(2, slot[:1], new)
    else:
        stored[torch.arange(slot.shape[0], device=slot.device), :, slot] = new[:, :, 0]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, T, D] of the last T of N positions, k and v [B, Hkv, N, D] -> [B, H, T, D]."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        return decode_attention(q, k, v, None)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        # Flash attention aligns causality to the lower right by itself: no mask of T x N, which at long contexts is
        # larger than the keys, and which with grouped heads leaves only the form that writes all scores to memory.
        # Imported here: it brings torch._dynamo, two seconds that a process without a GPU need not spend.
        from torch.nn.attention.bias import causal_lower_right

        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(queries, keys), enable_gqa=True)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


LONG_ON_CPU = 1536
"""Keys from which two bf16 products beat SDPA on a CPU (2.3 times at 8192 keys, 0.8 at 1024; EPYC with AVX512-BF16)."""


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query per head over all keys: q [B, H, 1, D], k and v [B, Hkv, N, D], mask [B, N] or None -> [B, H, 1, D].

    The query heads of a group stand as rows of one product, so that its keys and values are read once and never
    repeated in memory. SDPA with grouped heads and a single query is ten times slower than this on a CPU in bf16.
    """
    grouped = q.reshape(k.shape[0], k.shape[1], -1, k.shape[3])
    mask = None if mask is None else mask[:, None, None]
    if k.device.type == "cpu" and k.dtype == torch.bfloat16 and k.shape[2] >= LONG_ON_CPU:
        scores = (grouped * k.shape[3] ** -0.5) @ k.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).view(q.shape)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
