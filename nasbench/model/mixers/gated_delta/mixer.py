"""What G and J share: projections, gates, the gated delta rule over an fp32 state, the gated output norm."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from nasbench_kernels.gated_delta import RowLayout, chunked_gated_delta, gated_delta_step
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import Block, BlockCache
from nasbench.model.documents import RESET_LOG_DECAY
from nasbench.model.meta import Meta, SequenceMeta, StepMeta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.spec import GatedDeltaSpec
from nasbench.model.packed import PackedProjections

NORM_EPS = 1e-5
"""Of the output norm, in published checkpoints."""
L2_EPS = 1e-6
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 1.0, 256.0
"""Tokens after which a head's memory has halved, at the start of training; heads are spread in between."""
STEP_SIZE = 0.1
"""softplus(dt_bias) at the start: small enough for a_proj to change any head's memory by an order of magnitude."""
WIDEST_KEY, WIDEST_TRAINED_KEY = 256, 128
"""Key dimensions up to which the chunked kernels keep their tiles in registers, without and with a backward."""
START_SHARPNESS, START_VALUE_SCALE = 4.0, 0.25
"""What the attention's queries and keys, and its values, are multiplied by before their SiLU.

Both SiLUs are foreign to the attention. A norm follows each, so the scales are free: large queries and keys make SiLU a
ReLU, which tells them apart better; small values keep it near a line, which keeps their sign. With the output
projection solved by ridge regression, both, and half-lives of 1 to 256 tokens instead of 4 to 512, lower the error
against SmolLM2-135M's attention from 0.597 to 0.577 (held-out text, mean of 6 layers, 512 tokens)."""
START_BETA_LOGIT = -2.0
"""Where the logit of beta starts. Softmax attention averages over many tokens; at the beta of 1/2 that a random
projection gives, the delta rule soon overwrites what like keys wrote. On SmolLM2-135M with output projections solved,
the error over layers was 0.417 with random logits, and 0.397, 0.387, 0.390, 0.406 at -1, -2, -3, -4."""


class GatedDeltaMixer(Block):
    """Linear attention whose state is one matrix per head. Subclasses say how queries, keys and values are made."""

    spec: GatedDeltaSpec
    supports_packed_documents: ClassVar[bool] = True
    # bf16 would round the slowest decays to one another.
    fp32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    def __init__(self, spec: GatedDeltaSpec) -> None:
        super().__init__(spec)
        hidden, heads = spec.shape.hidden_size, spec.num_heads
        self.heads, self.key_dim, self.value_dim = heads, spec.key_dim, spec.value_dim
        self.q_proj = nn.Linear(hidden, spec.keys, bias=False)
        self.k_proj = nn.Linear(hidden, spec.keys, bias=False)
        self.v_proj = nn.Linear(hidden, spec.values, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.g_proj = nn.Linear(hidden, spec.values, bias=False)
        self.o_proj = nn.Linear(spec.values, hidden, bias=False)
        self.A_log = nn.Parameter((math.log(2) / spread_half_lives(heads) / STEP_SIZE).log())
        self.dt_bias = nn.Parameter(torch.full((heads,), math.log(math.expm1(STEP_SIZE)), dtype=torch.float32))
        self.o_norm = nn.RMSNorm(spec.value_dim, eps=NORM_EPS)

    @property
    def out(self) -> nn.Linear:
        return self.o_proj

    def further_projections(self) -> Sequence[nn.Linear]:
        """Projections of the layer's input that a subclass adds to those of every gated-delta mixer."""
        return ()

    @cached_property
    def packed(self) -> PackedProjections:  # type: ignore[override]
        """Every projection of the input, the wide ones first so that rows stay aligned."""
        wide = (self.q_proj, self.k_proj, self.v_proj, self.g_proj, *self.further_projections())
        return PackedProjections((*wide, self.a_proj, self.b_proj))

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        """The state [B, H, K, V], fp32 or bf16 as specified, and the convolutions' last inputs [B, W-1, channels]."""
        spec = self.spec
        kind = torch.float32 if spec.state_bits == 32 else torch.bfloat16
        state = torch.zeros(batch, self.heads, self.key_dim, self.value_dim, device=device, dtype=kind)
        conv_state = torch.zeros(batch, spec.conv_size - 1, spec.conv_channels, device=device, dtype=dtype)
        return BlockCache(context, {"state": state}, {"inputs": conv_state})

    @abstractmethod
    def convolve(self, parts: Sequence[Tensor], meta: Meta, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Short convolutions and SiLU of the projected q, k [B, T, H * K], v [B, T, H * V] and whatever follows them
        -> q and k side by side [B, T, 2 * H * K], v. `past`: the conv state, advanced in place."""

    def recurrence_inputs(self, row: Tensor, meta: Meta, cache: BlockCache | None) -> tuple[Tensor, ...]:
        """row [B, T, P] -> q, k [B, T, H, K] of norm 1, v [B, T, H, V], log decay and beta [B, T, H], fp32 but for v,
        and the output gate before its SiLU [B, T, H * V]."""
        parts = self.packed.split(row)
        decay, beta = self.gates(parts[-2], parts[-1], meta)
        both, v = self.convolve(parts, meta, cache.conv_state["inputs"] if cache else None)
        q, k = l2_norm(both.unflatten(-1, (2 * self.heads, self.key_dim))).chunk(2, dim=2)
        return q, k, v.unflatten(-1, (self.heads, self.value_dim)), decay, beta, parts[3]

    def gates(self, decay: Tensor, beta: Tensor, meta: Meta) -> tuple[Tensor, Tensor]:
        """Projections [B, T, H] -> (log decay, beta), fp32."""
        decay = -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias.float())
        if meta.documents is not None:
            decay = decay.masked_fill(meta.documents.first[..., None], RESET_LOG_DECAY)
        return decay, beta.float().sigmoid()

    def gated(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """Output norm per head and output gate: [B, T, H, V] and [B, T, H * V] -> [B, T, H * V]."""
        return self.o_norm(mixed.to(gate.dtype)).flatten(2) * F.silu(gate)

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        q, k, v, decay, beta, gate = self.recurrence_inputs(row, meta, cache)
        if isinstance(meta, StepMeta):
            assert cache is not None
            q, k, v, decay, beta = (tensor[:, 0] for tensor in (q, k, v, decay, beta))
            return self.gated(gated_delta_step(q, k, v, decay, beta, cache.state["state"])[:, None], gate)
        state = cache.state["state"] if cache else None
        mixed, new_state = chunked_gated_delta(q, k, v, decay, beta, None if state is None else state.float())
        if state is not None:
            state.copy_(new_state)
        return self.gated(mixed, gate)

    @abstractmethod
    def train_inputs(self, row: Tensor, meta: SequenceMeta) -> tuple[Tensor, ...]:
        """`recurrence_inputs` by kernels that have a backward."""

    def train_core(self, row: Tensor, meta: SequenceMeta) -> Tensor:
        if self.key_dim > WIDEST_TRAINED_KEY:
            return self.core(row, meta) if torch.is_grad_enabled() else self.prefill_core(row, meta)
        if meta.documents is None and not torch.is_grad_enabled():
            return self.prefill_core(row, meta)
        q, k, v, decay, beta, gate = self.train_inputs(row, meta)
        mixed, _ = fused.ops().triton_gated_delta(q, k, v, decay, beta, None)
        return fused.ops().gated_norm(mixed, gate, self.o_norm.weight)

    def prefill_core(self, row: Tensor, meta: SequenceMeta, cache: BlockCache | None = None) -> Tensor:
        if meta.documents is not None and cache is None and self.key_dim <= WIDEST_TRAINED_KEY:
            return self.train_core(row, meta)
        if meta.documents is not None or self.key_dim > WIDEST_KEY:
            return self.core(row, meta, cache)
        ops, layout = fused.ops(), self.row_layout
        past, state = (cache.conv_state["inputs"], cache.state["state"]) if cache else (None, None)
        mixed, v = self.prefill_convolve(row, past)
        q, k, decay, beta = ops.recurrence_inputs(row, layout, self.key_dim, self.A_log, self.dt_bias, mixed)
        output, new_state = ops.triton_gated_delta(q, k, v.unflatten(-1, (self.heads, -1)), decay, beta, state)
        if state is not None:
            state.copy_(new_state)
        return ops.gated_norm(output, row[..., layout.gate : layout.gate + v.shape[-1]], self.o_norm.weight)

    @abstractmethod
    def prefill_convolve(self, row: Tensor, past: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """As `convolve`, of rows [B, T, P]: queries and keys in the first 2 H K columns of [B, T, >= 2 H K], or None
        where they have no convolution; values [B, T, H * V]."""

    @abstractmethod
    def decode_convolve(self, row: Tensor, past: Tensor, active: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Prepares a decode step: either convolves q, k and v in the rows [B, P] in place and returns (None, None), or
        returns the dynamic convolution weights [B, H * V, W] and the values' conv state for the kernel to do it."""

    @cached_property
    def row_layout(self) -> RowLayout:
        """Where the parts of the packed projections' rows begin."""
        begins = [0, *accumulate(self.packed.sizes)]
        return RowLayout(*begins[:4], *begins[-3:-1])

    def decode_core(self, row: Tensor, meta: StepMeta, cache: BlockCache | None, active: Tensor | None) -> Tensor:
        assert cache is not None
        convolution = self.decode_convolve(row, cache.conv_state["inputs"], active)
        return fused.ops().recurrent_step(
            row, self.row_layout, cache.state["state"], self.A_log, self.dt_bias, self.o_norm.weight,
            fused.workspace(row.device), *convolution,
        )  # fmt: skip

    def calibration(self, constant: Tensor) -> dict[str, Tensor]:
        """b_proj such that beta's logit is about START_BETA_LOGIT on the layer's inputs."""
        return {"b_proj.weight": (START_BETA_LOGIT * constant).expand(self.b_proj.weight.shape)}

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """Projections from the attention's, key/value heads repeated for their group; the rest as built.

        A head whose dimension differs copies the leading channels; further channels start small and random, with
        zeros in the output projection.
        """
        mixer = cls(spec).to(attention.q_proj.weight)
        q, k, v, o = heads_of(attention)
        with torch.no_grad():
            for ours, source in ((mixer.q_proj, q), (mixer.k_proj, k), (mixer.v_proj, v)):
                copy_heads(ours.weight.unflatten(0, (mixer.heads, -1)), source)
            output = mixer.o_proj.weight.zero_().unflatten(1, (mixer.heads, -1))
            copy_heads(output.permute(1, 2, 0), o)
        return mixer


def spread_half_lives(heads: int) -> Tensor:
    """Half-lives in tokens, fp32 [H], evenly in the logarithm."""
    share = torch.linspace(0, 1, heads, dtype=torch.float32) if heads > 1 else torch.full((1,), 0.5)
    return SHORTEST_HALF_LIFE * (LONGEST_HALF_LIFE / SHORTEST_HALF_LIFE) ** share.float()


def heads_of(attention: FullAttention) -> tuple[Tensor, ...]:
    """The attention's q, k, v and output weights by query head, [H, D, C]; keys and values repeated for their group."""
    dim, group = attention.head_dim, attention.group
    q, k, v = (
        projection.weight.unflatten(0, (-1, dim)).repeat_interleave(times, 0)
        for projection, times in ((attention.q_proj, 1), (attention.k_proj, group), (attention.v_proj, group))
    )
    return q, k, v, attention.o_proj.weight.unflatten(1, (-1, dim)).permute(1, 2, 0)


def copy_heads(ours: Tensor, source: Tensor) -> None:
    """Copies the leading part of [H, D, C] into [H', D', C]; the rest of `ours` stays."""
    heads, dim = min(ours.shape[0], source.shape[0]), min(ours.shape[1], source.shape[1])
    ours[:heads, :dim] = source[:heads, :dim]


def l2_norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, computed and returned in fp32."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()
