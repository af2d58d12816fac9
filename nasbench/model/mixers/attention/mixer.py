"""A with weights: grouped-query attention over a static cache. The sliding window shares it all but the cache size."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import Block, BlockCache
from nasbench.model.documents import document_attention
from nasbench.model.meta import Meta, SequenceMeta, StepMeta
from nasbench.model.mixers.attention.flash import flash_attention, has_flash
from nasbench.model.packed import PackedProjections
from nasbench.model.rotary import apply_rotary
from nasbench.model.spec import MixerSpec


class FullAttention(Block):
    """Causal attention of H query heads over Hkv shared key/value heads, rotary positions, optional query/key norms."""

    spec: MixerSpec
    supports_packed_documents: ClassVar[bool] = True
    window: int | None = None
    """Keys that a query sees at most, itself included; None for all."""

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        shape = spec.shape
        self.head_dim = shape.head_dim
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.group = shape.num_heads // shape.num_kv_heads
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        widths = (queries, keys) if shape.wide_qk_norm else (shape.head_dim, shape.head_dim)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(width, eps=shape.rms_eps) if shape.qk_norm else nn.Identity() for width in widths
        )
        self.packed = PackedProjections((self.q_proj, self.k_proj, self.v_proj))

    @property
    def out(self) -> nn.Linear:
        return self.o_proj

    def slots(self, context: int) -> int:
        """Keys that a cache for `context` tokens holds."""
        return context

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        """Keys and values, [B, Hkv, slots, D] each."""
        size = (batch, self.num_kv_heads, self.slots(context), self.head_dim)
        state = {name: torch.zeros(size, device=device, dtype=dtype) for name in ("keys", "values")}
        return BlockCache(context, state)

    def slot(self, positions: Tensor, slots: int) -> Tensor:
        """Which of a cache's slots holds the key of each position."""
        return positions

    def heads(self, row: Tensor, meta: Meta) -> tuple[Tensor, Tensor, Tensor]:
        """row [B, T, P] -> q [B, H, T, D], k and v [B, Hkv, T, D], q and k normed and rotated."""
        cos, sin = meta.rotary(self.spec.shape)
        q, k, v = self.packed.split(row)
        if self.spec.shape.wide_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if not self.spec.shape.wide_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        # Queries and keys are rotated together: half as many small operations in a decode step.
        rotated = apply_rotary(torch.cat((q, k), dim=2), cos[..., None, :], sin[..., None, :])
        q, k = rotated.transpose(1, 2).split((self.num_heads, self.num_kv_heads), dim=1)
        return q, k, v.transpose(1, 2)

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        q, k, v = self.heads(row, meta)
        if isinstance(meta, SequenceMeta):
            return _merged(self.attend(q, k, v, meta, cache))
        assert cache is not None
        keys, values = cache.state["keys"], cache.state["values"]
        slots = keys.shape[2]
        slot = self.slot(meta.positions, slots)
        for stored, new in ((keys, k), (values, v)):
            write_slots(stored, new.to(stored.dtype), slot, meta.equal_lengths)
        seen = min(meta.max_seqlen, slots)
        # Slot s holds a key of this sequence from its position s on, in a ring as in a plain cache.
        mask = None if meta.equal_lengths else torch.arange(seen, device=q.device) <= meta.positions[:, None]
        return _merged(decode_attention(q, keys[:, :, :seen], values[:, :, :seen], mask))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, meta: SequenceMeta, cache: BlockCache | None) -> Tensor:
        """q [B, H, T, D], k and v [B, Hkv, T, D] of new tokens -> [B, H, T, D], the cache written in place."""
        if meta.documents is not None:
            return document_attention(q, k, v, meta.documents)
        if cache is not None:
            end = meta.start + q.shape[2]
            keys, values = cache.state["keys"], cache.state["values"]
            keys[:, :, meta.start : end] = k
            values[:, :, meta.start : end] = v
            if meta.start:
                k, v = keys[:, :, :end], values[:, :, :end]
        return causal_attention(q, k, v)

    def _rotated_in_one_launch(self, row: Tensor, meta: SequenceMeta) -> tuple[Tensor, Tensor, Tensor]:
        """row [B, T, P] -> q [B, T, H, D], k and v [B, T, Hkv, D]. With torch's own eight launches rotation took 3.9 of
        the 8.6 s that an H200 spent on SmolLM2-135M's benchmarks."""
        cos, sin = meta.rotary(self.spec.shape)
        return fused.ops().rotary(row, cos, sin, self.num_heads, self.num_kv_heads)

    def train_core(self, row: Tensor, meta: SequenceMeta) -> Tensor:
        if torch.is_grad_enabled() and (self.spec.shape.qk_norm or not self._takes_flash(row, meta)):
            return self.core(row, meta)
        return self.prefill_core(row, meta)

    def _takes_flash(self, row: Tensor, meta: SequenceMeta) -> bool:
        return meta.documents is None and has_flash(row, self.head_dim)

    def prefill_core(self, row: Tensor, meta: SequenceMeta, cache: BlockCache | None = None) -> Tensor:
        """Without a cache by flash attention, which knows windows and grouped heads, where it runs."""
        if self.spec.shape.qk_norm:
            return self.core(row, meta, cache)
        if cache is None and self._takes_flash(row, meta):
            return flash_attention(*self._rotated_in_one_launch(row, meta), self.window).flatten(2)
        q, k, v = (part.transpose(1, 2) for part in self._rotated_in_one_launch(row, meta))
        return _merged(self.attend(q, k, v, meta, cache))

    def decode_core(self, row: Tensor, meta: StepMeta, cache: BlockCache | None, active: Tensor | None) -> Tensor:
        if self.spec.shape.wide_qk_norm:
            return super().decode_core(row, meta, cache, active)
        assert cache is not None
        keys, values = cache.state["keys"], cache.state["values"]
        norms = (self.q_norm.weight, self.k_norm.weight) if self.spec.shape.qk_norm else (None, None)
        cos, sin = (table[:, 0] for table in meta.rotary(self.spec.shape))
        q = fused.ops().rotary_write(
            row, meta.positions, cos, sin, keys, values, self.num_heads, *norms, eps=self.spec.shape.rms_eps
        )
        return fused.ops().decode_attention(q, keys, values, meta.positions, meta.max_seqlen).flatten(1)

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """A copy of every weight."""
        mixer = cls(spec).to(attention.q_proj.weight)
        mixer.load_state_dict(attention.state_dict())
        return mixer


def _merged(mixed: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    return mixed.transpose(1, 2).flatten(2)


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
