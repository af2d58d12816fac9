"""C with weights: multi-head latent attention (arXiv 2405.04434, section 2.1.2 and appendix C).

    c_t = RMSNorm(x_t DKV)                              latent, shared by all heads
    k^R_t = RoPE(x_t KR)                                rotary key, shared by all heads
    k_ti = c_t UK_i,  v_ti = c_t UV_i                   key and value of head i
    q_ti, q^R_ti = x_t Q_i, RoPE(x_t QR_i)              as in DeepSeek-V2-Lite, whose queries are not compressed
    o_ti = sum_j softmax_j((q_ti . k_ji + q^R_ti . k^R_j) / sqrt(nope + rope)) v_ji

The cache holds c and k^R. A decode step reads it once for all heads, since UK_i goes to the query and UV_i to the
output ("absorbed"): q_ti . k_ji = (q_ti UK_i^T) . c_j, and o_ti = (sum_j p_j c_j) UV_i. Parameter names are those of
published checkpoints.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model.block import Block, BlockCache, with_weights
from nasbench.model.documents import document_attention
from nasbench.model.meta import Meta, StepMeta
from nasbench.model.mixers.attention.mixer import FullAttention, causal_attention, write_slots
from nasbench.model.mixers.gated_delta.mixer import heads_of
from nasbench.model.mixers.mla.spec import LatentAttentionSpec
from nasbench.model.packed import PackedProjections
from nasbench.model.rotary import apply_rotary

STEADY = 4.0
"""How much larger than an input's common part the constant latent is."""
MOST_EXPANDED = 1 << 28
"""Numbers of keys and values made from latents at once; sequences beyond it take turns."""


class LatentAttention(Block):
    """q_proj; kv_a_proj_with_mqa to latent and rotary key; kv_b_proj from the latent to keys and values."""

    spec: LatentAttentionSpec
    supports_packed_documents: ClassVar[bool] = True

    def __init__(self, spec: LatentAttentionSpec) -> None:
        super().__init__(spec)
        hidden, heads = spec.shape.hidden_size, spec.shape.num_heads
        self.q_proj = nn.Linear(hidden, heads * spec.query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, spec.latent + spec.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(spec.latent, eps=spec.shape.rms_eps)
        self.kv_b_proj = nn.Linear(spec.latent, heads * (spec.nope + spec.value), bias=False)
        self.o_proj = nn.Linear(heads * spec.value, hidden, bias=False)
        self.packed = PackedProjections((self.q_proj, self.kv_a_proj_with_mqa))

    @property
    def out(self) -> nn.Linear:
        return self.o_proj

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        """Normed latents and rotated keys side by side, [B, slots, latent + rope]."""
        size = (batch, context, self.spec.latent + self.spec.rope)
        return BlockCache(context, {"latents": torch.zeros(size, device=device, dtype=dtype)})

    def heads(self, x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        """[.., H * sum(sizes)] -> [.., H, size] of each."""
        return x.unflatten(-1, (self.spec.shape.num_heads, -1)).split(sizes, -1)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """UK^T [H, nope, latent] and UV^T [H, value, latent], views of kv_b_proj."""
        key, value = self.kv_b_proj.weight.unflatten(0, (self.spec.shape.num_heads, -1)).split(
            (self.spec.nope, self.spec.value), 1
        )
        return key, value

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        spec = self.spec
        q, kv = self.packed.split(row)
        q, q_rope = self.heads(q, spec.nope, spec.rope)
        latent, key = kv.split((spec.latent, spec.rope), -1)
        cos, sin = meta.rotary(spec.rope_shape)
        q_rope = apply_rotary(q_rope, cos[..., None, :], sin[..., None, :])
        new = torch.cat((self.kv_a_layernorm(latent), apply_rotary(key, cos, sin)), -1)
        if isinstance(meta, StepMeta):
            assert cache is not None
            latents = cache.state["latents"]
            write_slots(latents[:, None], new[:, None].to(latents.dtype), meta.positions, meta.equal_lengths)
            seen = min(meta.max_seqlen, cache.context)
            mask = None if meta.equal_lengths else torch.arange(seen, device=q.device) <= meta.positions[:, None]
            return self.absorbed(q[:, 0], q_rope[:, 0], latents[:, :seen], mask)[:, None]
        if cache is not None:
            latents, end = cache.state["latents"], meta.start + q.shape[1]
            latents[:, meta.start : end] = new
            new = latents[:, :end].to(new.dtype) if meta.start else new
        q = torch.cat((q, q_rope), -1)
        rows = max(1, MOST_EXPANDED // (new.shape[1] * self.kv_b_proj.out_features))
        parts = [self.expanded(*part, meta) for part in zip(q.split(rows), new.split(rows), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def expanded(self, q: Tensor, latents: Tensor, meta: Meta) -> Tensor:
        """Keys and values of each head made from latents [B, N, latent + rope]; q [B, T, H, query] of the last T tokens
        -> [B, T, H * value]."""
        spec = self.spec
        k, v = self.heads(self.kv_b_proj(latents[..., : spec.latent]), spec.nope, spec.value)
        shared = latents[..., None, spec.latent :].expand(*k.shape[:-1], spec.rope)
        # Attention kernels take heads of one size.
        v = F.pad(v, (0, spec.query - spec.value))
        q, k, v = (x.transpose(1, 2) for x in (q, torch.cat((k, shared), -1), v))
        mixed = causal_attention(q, k, v) if meta.documents is None else document_attention(q, k, v, meta.documents)
        return mixed.transpose(1, 2)[..., : spec.value].flatten(2)

    def absorbed(self, q: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """One token of every sequence over the latents themselves: q [B, H, nope], q_rope [B, H, rope], latents
        [B, N, latent + rope], mask [B, N] or None -> [B, H * value]."""
        up_key, up_value = self.up_projections()
        query = torch.cat((torch.einsum("bhn,hnl->bhl", q, up_key), q_rope), -1).to(latents.dtype)
        scores = (query @ latents.mT).float() * self.spec.query**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        mixed = scores.softmax(-1).to(latents.dtype) @ latents[..., : self.spec.latent]
        return torch.einsum("bhl,hvl->bhv", mixed.to(q.dtype), up_value).flatten(1)

    def decode_core(self, row: Tensor, meta: StepMeta, cache: BlockCache | None, active: Tensor | None) -> Tensor:
        from nasbench_kernels.mla.decode import latent_attention, latent_write

        assert cache is not None
        spec, latents, heads = self.spec, cache.state["latents"], self.spec.shape.num_heads
        cos, sin = (table[:, 0] for table in meta.rotary(spec.rope_shape))
        norm = self.kv_a_layernorm
        q_rope = latent_write(
            row, meta.positions, cos, sin, norm.weight, latents, heads, spec.nope, eps=spec.shape.rms_eps
        )
        up_key, up_value = self.up_projections()
        q = self.heads(row[:, : heads * spec.query], spec.nope, spec.rope)[0].transpose(0, 1)
        mixed = latent_attention(
            torch.bmm(q, up_key), q_rope, latents, meta.positions, meta.max_seqlen, spec.query**-0.5
        )
        out = row.new_empty(len(row), heads, spec.value)
        torch.bmm(mixed, up_value.mT, out=out.transpose(0, 1))
        return out.flatten(1)

    def calibration(self, constant: Tensor) -> dict[str, Tensor]:
        """The last latent becomes a large constant: then the latents' norm is nearly one factor for all tokens, which
        its weight takes back, and keys and values from latents are as linear in the input as the attention's."""
        latent, size = self.spec.latent, STEADY / constant.norm()
        weight = with_weights(self, lambda mixer: mixer.kv_a_proj_with_mqa.weight.detach().clone())
        weight[latent - 1] = size * constant
        scale = (size / latent**0.5).expand(latent)
        return {"kv_a_proj_with_mqa.weight": weight, "kv_a_layernorm.weight": scale}

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """Latents by a truncated SVD of the stacked key and value projections (arXiv 2502.14837), each scaled to the
        same norm first (arXiv 2502.07864). Biases and query and key norms have no place here.

        As many rotary pairs as the rotary key has stay rotated, with the frequencies nearest to its own: the queries'
        as they are, the keys' as the mean of all heads. The other pairs lose their rotation.
        """
        mixer = cls(spec).to(attention.q_proj.weight)
        dim, heads, rank = attention.head_dim, attention.num_heads, spec.latent
        half = [min(round(i * dim / spec.rope), dim // 2 - 1) for i in range(spec.rope // 2)]
        rotated = torch.tensor([*half, *(pair + dim // 2 for pair in half)])
        plain = torch.tensor([i for i in range(dim) if i not in rotated.tolist()], dtype=torch.int64)[: spec.nope]
        with torch.no_grad():
            q, k, v, output = (source.float() for source in heads_of(attention))
            own = [x[:: attention.group] for x in (k[:, plain], v[:, : spec.value])]  # of every key/value head
            scales = [1.0 / max(float(x.norm()), 1e-30) for x in own]
            stacked = torch.cat([(x * scale).flatten(0, 1) for x, scale in zip(own, scales, strict=True)])
            left, sizes, right = torch.linalg.svd(stacked, full_matrices=False)
            rank = min(rank - 1, len(sizes))  # the last latent is for `calibration`
            a, b = mixer.kv_a_proj_with_mqa.weight, mixer.kv_b_proj.weight.zero_().unflatten(0, (heads, -1))
            # Rows of length 1: inputs of size 1 give latents of size 1, which their norm leaves alone.
            a[:rank] = right[:rank]
            a[spec.latent :] = k[:: attention.group, rotated].mean(0)
            ups = (left[:, :rank] * sizes[:rank]).split([x.shape[0] * x.shape[1] for x in own])
            for up, scale, at, count in zip(ups, scales, (0, spec.nope), [x.shape[1] for x in own], strict=True):
                by_head = (up / scale).unflatten(0, (attention.num_kv_heads, count))
                b[:, at : at + count, :rank] = by_head.repeat_interleave(attention.group, 0)
            query = mixer.q_proj.weight.unflatten(0, (heads, -1))
            q *= (spec.query / dim) ** 0.5  # scores are divided by the root of another size
            query[:, : len(plain)], query[:, spec.nope :] = q[:, plain], q[:, rotated]
            into = mixer.o_proj.weight.zero_().unflatten(1, (heads, -1)).permute(1, 2, 0)
            into[:, :dim] = output[:, : spec.value]
        return mixer
