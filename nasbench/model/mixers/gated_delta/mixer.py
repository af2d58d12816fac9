"""What linear mixers share: projections, a recurrence over one fp32 matrix per head, the gated output norm.

    S_t = exp(g_t) S_{t-1},   S_t += beta_t k_t (v_t - S_t^T k_t)^T,   o_t = S_t^T q_t / sqrt(K)

| kind | q, k, v | log decay g | write | output gate |
|---|---|---|---|---|
| G Gated DeltaNet | convolved, SiLU, norm 1 | per head, learnt | delta rule | SiLU |
| J JetBlock | as G; a dynamic convolution of v alone | per head, learnt | delta rule | SiLU |
| D DeltaNet | as G | 0 | delta rule | none |
| K Kimi Delta Attention | as G | per key channel, learnt | delta rule | sigmoid |
| L GLA | as projected | per key channel, learnt | k v^T | SiLU |
| T RetNet | rotated | per head, fixed | k v^T | SiLU |

Shapes: B sequences, T tokens, H heads, K key channels and V value channels of a head, P outputs of all projections.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
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
from nasbench.model.mixers.gated_delta.spec import LinearSpec
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
LEARNT_DECAYS = ("A_log", "dt_bias")
"""They stay fp32: bf16 would round the slowest decays to one another."""
GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}

Recurrence = Callable[..., tuple[Tensor, Tensor]]
"""Takes what `naive_gated_delta` takes."""


class LowRank(nn.Sequential):
    """Two products with a narrow middle, whose names are 0 and 1 as published."""

    def __init__(self, hidden: int, middle: int, size: int, bias: bool = False) -> None:
        super().__init__(nn.Linear(hidden, middle, bias=False), nn.Linear(middle, size, bias=bias))

    @property
    def narrow(self) -> nn.Linear:
        return self.get_submodule("0")  # type: ignore[return-value]

    @property
    def wide(self) -> nn.Linear:
        return self.get_submodule("1")  # type: ignore[return-value]


class LinearMixer(Block):
    """Linear attention whose state is one matrix per head. Subclasses name their projections of the layer's input and
    say how queries, keys, values and gates follow from them."""

    spec: LinearSpec
    supports_packed_documents: ClassVar[bool] = True
    decay_sign: ClassVar[float] = 1.0
    """The log decay is -exp(A_log) softplus(decay_sign x + dt_bias) with x from `decay_input`; 0: there is no x."""
    gate: ClassVar[str] = "silu"
    """Activation of the output gate, "" for none."""
    unit: ClassVar[bool] = True
    """Whether `vectors` brings queries and keys to norm 1; in a decode step the kernel does."""
    A_log: Tensor
    dt_bias: Tensor

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        hidden = spec.shape.hidden_size
        self.heads, self.key_dim, self.value_dim = spec.num_heads, spec.key_dim, spec.value_dim
        self.q_proj = nn.Linear(hidden, spec.keys, bias=False)
        self.k_proj = nn.Linear(hidden, spec.keys, bias=False)
        self.v_proj = nn.Linear(hidden, spec.values, bias=False)
        self.add_gates(hidden)
        self.o_proj = nn.Linear(spec.values, hidden, bias=False)
        self.o_norm = nn.RMSNorm(spec.value_dim, eps=NORM_EPS)

    @abstractmethod
    def add_gates(self, hidden: int) -> None:
        """Makes projections and parameters of decay, write gate and output gate. A_log [H] and dt_bias [H or H * K]
        are fp32 parameters, or buffers where the kind fixes them."""

    def learn_decays(self, each: int = 1) -> None:
        """A_log and dt_bias as parameters, with half-lives spread over the heads; `each`: decays of a head."""
        self.A_log = nn.Parameter((math.log(2) / spread_half_lives(self.heads) / STEP_SIZE).log())
        bias = torch.full((self.heads * each,), math.log(math.expm1(STEP_SIZE)), dtype=torch.float32)
        self.dt_bias = nn.Parameter(bias)

    def fix_decays(self, rates: Tensor, each: int = 1) -> None:
        """A_log and dt_bias as constants. With x = 0, log decays are -rates [H]."""
        self.register_buffer("A_log", (rates.float() / math.log(2)).log(), persistent=False)
        self.register_buffer("dt_bias", torch.zeros(self.heads * each, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves like any block; fixed decays stay fp32."""
        fixed = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in fixed.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    @property
    @abstractmethod
    def inputs(self) -> dict[str, nn.Linear]:
        """The projections of the layer's input by what they give: q, k, v first; gate, decay and beta where they are
        whole projections. The narrow ones last, so that rows stay aligned."""

    @property
    def out(self) -> nn.Linear:
        return self.o_proj

    @cached_property
    def packed(self) -> PackedProjections:  # type: ignore[override]
        return PackedProjections(tuple(self.inputs.values()), padded=True)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @cached_property
    def row_layout(self) -> RowLayout:
        """Where the parts of the packed projections' rows begin; 0 for what a kind has not."""
        begins = dict(zip(self.names, accumulate(self.packed.sizes, initial=0), strict=False))
        return RowLayout(*(begins.get(name, 0) for name in RowLayout._fields))

    def parts(self, row: Tensor) -> dict[str, Tensor]:
        """A row [.., at least P] as the outputs of each projection."""
        return dict(zip(self.names, self.packed.split(row), strict=True))

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        """The state [B, H, K, V], fp32 or bf16 as specified, and short convolutions' last inputs [B, W-1, channels]."""
        spec = self.spec
        kind = torch.float32 if spec.state_bits == 32 else torch.bfloat16
        state = torch.zeros(batch, self.heads, self.key_dim, self.value_dim, device=device, dtype=kind)
        conv_state = torch.zeros(batch, spec.conv_size - 1, spec.conv_channels, device=device, dtype=dtype)
        return BlockCache(context, {"state": state}, {"inputs": conv_state} if spec.conv_channels else None)

    @abstractmethod
    def vectors(
        self, parts: dict[str, Tensor], meta: Meta, past: Tensor | None, kernels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [B, T, H, K] and values [B, T, H, V] as the recurrence takes them.

        Args:
            past: the conv state, advanced in place.
            kernels: by Triton kernels that have a backward, where there are any.
        """

    def decay_input(self, parts: dict[str, Tensor]) -> Tensor | None:
        """x of the log decay, [.., H] or [.., H * K]."""
        return parts.get("decay")

    def output_gate(self, parts: dict[str, Tensor]) -> Tensor | None:
        """The output gate before its activation, [.., H * V]."""
        return parts.get("gate")

    def gates(self, parts: dict[str, Tensor], meta: Meta) -> tuple[Tensor, Tensor | None]:
        """(log decay [B, T, H] or [B, T, H, K], beta [B, T, H] or None), fp32."""
        x, rate, shift = self.decay_input(parts), self.A_log.float().exp(), self.dt_bias.float()
        if len(shift) > self.heads:
            rate, shift = rate[:, None], shift.unflatten(0, (self.heads, self.key_dim))
        if x is None:
            decay = (-rate * F.softplus(shift)).expand(*parts["q"].shape[:-1], *shift.shape)
        else:
            decay = -rate * F.softplus(self.decay_sign * x.float().unflatten(-1, shift.shape) + shift)
        if meta.documents is not None:
            first = meta.documents.first
            decay = decay.masked_fill(first.unflatten(-1, (-1, *[1] * shift.dim())), RESET_LOG_DECAY)
        return decay, parts["beta"].float().sigmoid() if "beta" in parts else None

    def gated(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """Output norm per head and output gate: [B, T, H, V] and [B, T, H * V] -> [B, T, H * V]."""
        normed = self.o_norm(mixed).flatten(2)
        return normed if gate is None else normed * GATES[self.gate](gate)

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        return self._with(chunked_gated_delta, row, meta, cache)

    def _with(self, chunks: Recurrence, row: Tensor, meta: Meta, cache: BlockCache | None) -> Tensor:
        """The whole core; sequences go through `chunks`."""
        parts = self.parts(row)
        past, state = (cache.conv_state.get("inputs"), cache.state["state"]) if cache else (None, None)
        kernels = chunks is not chunked_gated_delta
        q, k, v = self.vectors(parts, meta, past, kernels)
        decay, beta = self.gates(parts, meta)
        if isinstance(meta, StepMeta):
            assert state is not None
            q, k, v, decay = (x[:, 0] for x in (q, k, v, decay))
            mixed = gated_delta_step(q, k, v, decay, None if beta is None else beta[:, 0], state)[:, None]
        else:
            if kernels:
                q, k = q.to(v.dtype), k.to(v.dtype)
            mixed, new_state = chunks(q, k, v, decay, beta, None if state is None else state.float())
            if state is not None:
                state.copy_(new_state)
        return self.gated(mixed.to(v.dtype), self.output_gate(parts))

    def fast_chunks(self, row: Tensor) -> Recurrence | None:
        """Chunks by kernels that have a backward, for rows on a GPU; None where there are none."""
        widest = WIDEST_TRAINED_KEY if torch.is_grad_enabled() else WIDEST_KEY
        return fused.ops().triton_gated_delta if self.key_dim <= widest else None

    def train_core(self, row: Tensor, meta: SequenceMeta) -> Tensor:
        return self._with(self.fast_chunks(row) or chunked_gated_delta, row, meta, None)

    def prefill_core(self, row: Tensor, meta: SequenceMeta, cache: BlockCache | None = None) -> Tensor:
        return self._with(self.fast_chunks(row) or chunked_gated_delta, row, meta, cache)

    def decode_convolve(self, row: Tensor, past: Tensor, active: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the decode kernel convolves with, and the conv state: the values' dynamic taps [B, H * V, W], or the
        taps [2 H * K + H * V, W] of a static convolution of q, k and v."""
        return None, None

    def decode_gates(
        self, parts: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """What decays per channel are made of, [B, H * K], and the output gate, [B, H * V], where the rows have them
        not; and weight and bias of a narrow product that makes the former inside the kernel."""
        return None, None, None

    def tables(self, meta: StepMeta) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines that rotate queries and keys."""
        return None

    def decode_core(self, row: Tensor, meta: StepMeta, cache: BlockCache | None, active: Tensor | None) -> Tensor:
        assert cache is not None
        ops, parts, layout = fused.ops(), self.parts(row), self.row_layout
        convolution = self.decode_convolve(row, cache.conv_state["inputs"], active) if cache.conv_state else ()
        decay, gate, product = self.decode_gates(parts)
        return ops.recurrent_step(
            row, layout, cache.state["state"], self.A_log, self.dt_bias, self.o_norm.weight,
            fused.workspace(row.device), *convolution,
            form=ops.StepForm(self.unit, "beta" in parts, self.decay_sign, self.gate),
            decay=decay, gate=gate, tables=self.tables(meta), decay_product=product,
        )  # fmt: skip

    def calibration(self, constant: Tensor) -> dict[str, Tensor]:
        """b_proj such that beta's logit is about START_BETA_LOGIT on the layer's inputs."""
        if "beta" not in self.inputs:
            return {}
        return {"b_proj.weight": (START_BETA_LOGIT * constant).expand(self.inputs["beta"].weight.shape)}

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


class GatedDeltaMixer(LinearMixer):
    """The delta rule with a decay per head: kernels make its inputs from the rows where they lie (G, J, D)."""

    fp32_parameters: ClassVar[tuple[str, ...]] = LEARNT_DECAYS

    def add_gates(self, hidden: int) -> None:
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.a_proj = nn.Linear(hidden, self.heads, bias=False)
        self.g_proj = nn.Linear(hidden, self.spec.values, bias=False)
        self.learn_decays()

    def prefill_core(self, row: Tensor, meta: SequenceMeta, cache: BlockCache | None = None) -> Tensor:
        if meta.documents is not None or self.key_dim > WIDEST_KEY:
            return super().prefill_core(row, meta, cache)
        ops, layout = fused.ops(), self.row_layout
        past, state = (cache.conv_state["inputs"], cache.state["state"]) if cache else (None, None)
        mixed, v = self.prefill_convolve(row, past)
        q, k, decay, beta = ops.recurrence_inputs(row, layout, self.key_dim, self.A_log, self.dt_bias, mixed)
        output, new_state = ops.triton_gated_delta(q, k, v.unflatten(-1, (self.heads, -1)), decay, beta, state)
        if state is not None:
            state.copy_(new_state)
        return self.gated_by_kernel(output, row[..., layout.gate : layout.gate + v.shape[-1]])

    def gated_by_kernel(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """As `gated`, in one launch."""
        return fused.ops().gated_norm(mixed, gate, self.o_norm.weight) if self.gate else self.gated(mixed, None)

    @abstractmethod
    def prefill_convolve(self, row: Tensor, past: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Short convolutions and SiLU of rows [B, T, P], the conv state `past` advanced in place -> queries and keys in
        the first 2 H K columns of [B, T, >= 2 H K], or None where they have no convolution; values [B, T, H * V]."""

    def train_core(self, row: Tensor, meta: SequenceMeta) -> Tensor:
        if self.key_dim > WIDEST_TRAINED_KEY or (meta.documents is None and not torch.is_grad_enabled()):
            return super().train_core(row, meta) if torch.is_grad_enabled() else self.prefill_core(row, meta)
        q, k, v, decay, beta, gate = self.train_inputs(row, meta)
        mixed, _ = fused.ops().triton_gated_delta(q, k, v, decay, beta, None)
        return self.gated_by_kernel(mixed, gate)

    def train_inputs(self, row: Tensor, meta: SequenceMeta) -> Sequence[Any]:
        """q, k, v, log decay and beta of the recurrence, and the output gate, by kernels that have a backward."""
        parts = self.parts(row)
        q, k, v = self.vectors(parts, meta, None, kernels=True)
        return q.to(v.dtype), k.to(v.dtype), v, *self.gates(parts, meta), self.output_gate(parts)


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
