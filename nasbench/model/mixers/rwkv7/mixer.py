"""R with weights: RWKV7's time mixing (arXiv 2503.14456, section 4.1).

With x the layer's input, x' the token before, and x^i = x + (x' - x) mix_i for each of the six inputs:

    r, k, v = x^r R, x^k K, x^v V                                  receptance, key, value
    w = exp(-e^-1/2 sigmoid(w0 + tanh(x^w W1) W2))                 decay of each channel
    a = sigmoid(a0 + x^a A1 A2)                                    in-context learning rate
    g = sigmoid(x^g G1) G2                                         output gate
    kappa = L2norm(k k_k) per head,  k~ = k (1 + (a - 1) k_a)      removal and replacement key
    S_t = S_{t-1} (diag(w) - kappa^T (a kappa)) + v^T k~
    y = (GroupNorm(S_t r) + (r r_k k~^T) v) g,  written through the output projection

The published value residual, which mixes the first layer's values into later ones, is left out: a layer that takes an
attention's place must not depend on which layers before it are of its kind.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from nasbench_kernels.rwkv7 import chunked_rwkv7, rwkv7_step
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model.block import Block, BlockCache
from nasbench.model.meta import Meta, SequenceMeta, StepMeta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.mixer import copy_heads, heads_of, spread_half_lives
from nasbench.model.mixers.rwkv7.spec import RWKV7Spec
from nasbench.model.packed import PackedProjections
from nasbench.model.shift import PREVIOUS, shift_cache, shifted
from nasbench.model.spec import STATE_BITS
from nasbench.model.stream import Stream

STRONGEST_DECAY = math.exp(-0.5)
"""The negative logarithm of the decay is below it."""
NORM_EPS = 1e-5
"""Of the output norm, for each channel of a head, in published models."""
SHORTEST_HALF_LIFE = 1.5
"""Tokens after which a head's state has halved at the start of training; no decay is stronger than 1.14 tokens'."""
START_RATE, START_NORM = -2.0, 0.1
"""Where the logit of the in-context learning rate starts, as the beta of G and J, and the output norm's weight, as M's:
features as large as a norm of 1 gives are larger than the attention's."""
R, K, V, W, A, G = range(6)
"""Rows of the token shifts' weights."""


@cache
def _has_fla() -> bool:
    return find_spec("fla") is not None


class RWKV7(Block):
    """Its projections read other inputs each, so all products stand in `core`, which takes the normalised input."""

    spec: RWKV7Spec
    supports_packed_documents: ClassVar[bool] = True

    def __init__(self, spec: RWKV7Spec) -> None:
        super().__init__(spec)
        hidden, inner, (decay, rate, gate) = spec.shape.hidden_size, spec.inner, spec.ranks
        self.mix = nn.Parameter(torch.zeros(6, hidden))
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(3))
        self.w1, self.a1, self.g1 = (nn.Linear(hidden, rank, bias=False) for rank in spec.ranks)
        self.w2, self.a2, self.g2 = nn.Linear(decay, inner), nn.Linear(rate, inner), nn.Linear(gate, inner, bias=False)
        self.k_k = nn.Parameter(torch.ones(inner))
        self.k_a = nn.Parameter(torch.ones(inner))
        self.r_k = nn.Parameter(torch.zeros(inner))
        self.norm = nn.GroupNorm(spec.num_heads, inner, eps=NORM_EPS * spec.head_dim)
        self.o_proj = nn.Linear(inner, hidden, bias=False)
        self.packed = PackedProjections((self.r_proj, self.k_proj, self.v_proj, self.w1, self.a1, self.g1))
        half_lives = spread_half_lives(spec.num_heads).clamp(min=SHORTEST_HALF_LIFE)
        with torch.no_grad():
            logits = torch.logit(math.log(2) / half_lives / STRONGEST_DECAY)
            self.w2.bias.copy_(logits.repeat_interleave(spec.head_dim))
            self.a2.bias.fill_(START_RATE)
            # A gate of about 1 in every channel: sigmoid is about a half.
            self.g2.weight.fill_(2 / gate)

    @property
    def out(self) -> nn.Linear:
        return self.o_proj

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        """The state [B, H, K, V], fp32 or bf16 as specified, and the last input."""
        kept, spec = shift_cache(batch, context, self.spec.shape.hidden_size, device, dtype), self.spec
        kind = torch.float32 if spec.state_bits == STATE_BITS[0] else torch.bfloat16
        kept.state["state"] = torch.zeros(
            batch, spec.num_heads, spec.head_dim, spec.head_dim, device=device, dtype=kind
        )
        return kept

    def features(self, stream: Stream, norm: nn.Module | None, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        return stream.core(self, stream.normed(norm), meta, cache)

    def heads(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., H, P]."""
        return x.unflatten(-1, (self.spec.num_heads, -1))

    def recurrence_inputs(self, x: Tensor, before: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """x and the tokens before, [B, T, C] -> what `naive_rwkv7` takes, [B, T, H, P] each, and the output gate
        [B, T, D]."""
        change = before - x
        mixed = [x + change * mix for mix in self.mix]
        r, k, v = (self.heads(linear(mixed[i])) for linear, i in ((self.r_proj, R), (self.k_proj, K), (self.v_proj, V)))
        decay = -STRONGEST_DECAY * self.heads(self.w2(self.w1(mixed[W]).tanh())).float().sigmoid()
        rate = self.heads(self.a2(self.a1(mixed[A]))).float().sigmoid()
        gate = self.g2(self.g1(mixed[G]).sigmoid())
        removal = F.normalize(k.float() * self.heads(self.k_k), dim=-1)
        k = (k * (1 + (rate - 1) * self.heads(self.k_a))).to(v.dtype)
        return (r, decay, k, v, -removal, removal * rate), gate

    def gated(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Output norm of every head, the token's own value, output gate: [B, T, H, P] -> [B, T, D]."""
        normed = self.norm(y.flatten(0, 1).flatten(1).to(gate.dtype)).view(gate.shape)
        bonus = (r.float() * k * self.heads(self.r_k)).sum(-1, keepdim=True) * v
        return (normed + bonus.flatten(2).to(gate.dtype)) * gate

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        """Normalised input [B, T, C] -> [B, T, D]."""
        (r, decay, k, v, a, b), gate = self.recurrence_inputs(row, shifted(row, meta, cache))
        state = cache.state["state"] if cache else None
        if isinstance(meta, StepMeta):
            assert state is not None
            y = rwkv7_step(r[:, 0], decay[:, 0], k[:, 0], v[:, 0], a[:, 0], b[:, 0], state)[:, None]
            return self.gated(y, r, k, v, gate)
        return self.gated(_recurrence(r, decay, k, v, a, b, state, meta), r, k, v, gate)

    def train_core(self, row: Tensor, meta: SequenceMeta) -> Tensor:
        return self.core(row, meta)

    def prefill_core(self, row: Tensor, meta: SequenceMeta, cache: BlockCache | None = None) -> Tensor:
        """As `core`, with one launch for what stands between products."""
        if meta.documents is not None:
            return self.core(row, meta, cache)
        from nasbench_kernels.rwkv7.prefill import gated_output, recurrence_inputs, token_mixes

        row = row.contiguous()
        last = row.new_zeros(len(row), row.shape[2]) if cache is None else cache.conv_state[PREVIOUS]
        mixed = token_mixes(row, last, self.mix)
        last.copy_(row[:, -1])
        weight = self.packed.weight_and_bias()[0][: W * self.spec.inner].unflatten(0, (W, -1))
        products = torch.bmm(mixed[:W].flatten(1, 2), weight.mT).unflatten(1, row.shape[:2])
        r, k, v = (self.heads(product) for product in products)
        raw_decay, raw_rate = self.w2(self.w1(mixed[W]).tanh()), self.a2(self.a1(mixed[A]))
        gate = self.g2(self.g1(mixed[G]).sigmoid())
        del mixed
        decay, k, a, b = recurrence_inputs(k, raw_decay, raw_rate, self.k_k, self.k_a, STRONGEST_DECAY)
        y = _recurrence(r, decay, k, v, a, b, cache.state["state"] if cache else None, meta)
        norm = self.norm.weight, self.norm.bias
        return gated_output(y.contiguous(), r, k, v, gate, self.r_k, norm, self.norm.eps)

    def decode_core(self, row: Tensor, meta: StepMeta, cache: BlockCache | None, active: Tensor | None) -> Tensor:
        """Normalised input [B, 1, C] -> [B, D]."""
        from nasbench_kernels.linear.grouped import grouped_gemm
        from nasbench_kernels.rwkv7.decode import low_ranks, rwkv7_fused_step, token_mix

        assert cache is not None
        mixed = token_mix(row[:, 0], cache.conv_state[PREVIOUS], self.mix, len(self.mix))
        projected = grouped_gemm(mixed[0], mixed.stride(0), self.packed.weight_and_bias()[0], tuple(self.packed.sizes))
        ups = self.w2.weight, self.a2.weight, self.g2.weight
        raw = low_ranks(projected[:, W * self.spec.inner :], ups, (self.w2.bias, self.a2.bias))
        return rwkv7_fused_step(
            projected, raw, cache.state["state"], self.k_k, self.k_a, self.r_k, (self.norm.weight, self.norm.bias),
            strongest=STRONGEST_DECAY, eps=self.norm.eps,
        )  # fmt: skip

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """Receptance, key and value from the attention's queries, keys and values: linear attention reads r S where
        S = sum k^T v. Nothing looks back (mix = 0). Further channels start small and random, with zeros in the output
        projection."""
        mixer = cls(spec).to(attention.q_proj.weight)
        *sources, output = heads_of(attention)
        with torch.no_grad():
            for ours, source in zip((mixer.r_proj, mixer.k_proj, mixer.v_proj), sources, strict=True):
                copy_heads(ours.weight.unflatten(0, (spec.num_heads, -1)), source)
            copy_heads(mixer.o_proj.weight.zero_().unflatten(1, (spec.num_heads, -1)).permute(1, 2, 0), output)
            mixer.norm.weight.fill_(START_NORM)
        return mixer


def _recurrence(
    r: Tensor, decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, meta: Meta
) -> Tensor:
    """`chunked_rwkv7` of a sequence, by flash-linear-attention's kernels in half precision, differentiable; the state
    moves on in place."""
    if r.is_cuda and r.element_size() == 2 and meta.documents is None and _has_fla():
        from fla.ops.rwkv7 import chunk_rwkv7

        # Without the bound on the decay, it takes chunks of 16 tokens.
        y, new_state = chunk_rwkv7(
            r, decay, k, v, a.to(v.dtype), b.to(v.dtype), initial_state=None if state is None else state.float(),
            output_final_state=True, safe_gate=True, lower_bound=-STRONGEST_DECAY, chunk_size=64,
        )  # fmt: skip
    else:
        first = None if meta.documents is None else meta.documents.first
        y, new_state = chunked_rwkv7(r, decay, k, v, a, b, state, first)
    if state is not None:
        state.copy_(new_state)
    return y
