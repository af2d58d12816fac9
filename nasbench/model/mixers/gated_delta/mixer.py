"""What G and J share: projections, gates, the gated delta rule over an fp32 state, the gated output norm."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from nasbench_kernels.gated_delta import RowLayout, chunked_gated_delta, gated_delta_step
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import Chunk, MixerCache, Step, TokenMixer
from nasbench.model.documents import RESET_LOG_DECAY, Documents
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.spec import GatedDeltaSpec
from nasbench.model.packed import StackedProjections

NORM_EPS = 1e-5
"""Of the output norm, in published checkpoints."""
L2_EPS = 1e-6
FP32_PARAMETERS = ("A_log", "dt_bias")
"""Kept in fp32 whatever the model's dtype: bf16 would round the slowest decays to one another."""
SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 1.0, 256.0
"""Tokens after which a head's memory has halved, at the start of training; heads are spread in between."""
WIDEST_KEY, WIDEST_TRAINED_KEY = 256, 128
"""Key dimensions up to which the chunked kernels keep their tiles in registers, without and with a backward."""
START_SHARPNESS, START_VALUE_SCALE = 4.0, 0.25
"""What the attention's queries and keys, and its values, are multiplied by before their SiLU.

Both SiLUs are foreign to the attention. A norm follows each, so the scales are free: large queries and keys make SiLU a
ReLU, which tells them apart better; small values keep it near a line, which keeps their sign. With the readout solved
by ridge regression, the error against SmolLM2-135M's attention on held-out text (mean of 6 layers, 512 tokens) falls
from 0.597 to 0.577 by both and by half-lives of 1 to 256 tokens instead of 4 to 512."""


class GatedDeltaMixer(TokenMixer):
    """Linear attention whose memory is one matrix per head. Subclasses say how queries, keys and values are made."""

    config: GatedDeltaSpec
    keeps_documents_apart: ClassVar[bool] = True

    def __init__(self, config: GatedDeltaSpec) -> None:
        super().__init__(config)
        hidden, heads = config.shape.hidden_size, config.num_heads
        self.heads, self.key_dim, self.value_dim = heads, config.key_dim, config.value_dim
        self.q_proj = nn.Linear(hidden, config.keys, bias=False)
        self.k_proj = nn.Linear(hidden, config.keys, bias=False)
        self.v_proj = nn.Linear(hidden, config.values, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.g_proj = nn.Linear(hidden, config.values, bias=False)
        self.o_proj = nn.Linear(config.values, hidden, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.o_norm = nn.RMSNorm(config.value_dim, eps=NORM_EPS)
        self.spread_decays()

    def spread_decays(self) -> None:
        """Half-lives from a few to hundreds of tokens, evenly in the logarithm, at a step size softplus(dt_bias) of
        0.1: small enough for a_proj to shorten or lengthen any head's memory by an order of magnitude."""
        step_size = 0.1
        share = torch.linspace(0, 1, self.heads) if self.heads > 1 else torch.full((1,), 0.5)
        half_lives = SHORTEST_HALF_LIFE * (LONGEST_HALF_LIFE / SHORTEST_HALF_LIFE) ** share
        with torch.no_grad():
            self.A_log.copy_((math.log(2) / half_lives / step_size).log())
            self.dt_bias.fill_(math.log(math.expm1(step_size)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves like any module, except that a change to a half-precision dtype leaves the decay parameters fp32."""
        kept = {name: getattr(self, name).detach() for name in FP32_PARAMETERS}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < value.dtype.itemsize:
                parameter.data = value.to(parameter.device)
        return self

    @abstractmethod
    def new_history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Empty histories of the short convolutions, [B, W-1, channels]."""

    def further_projections(self) -> Sequence[nn.Linear]:
        """Projections of the layer's input that a subclass adds to those of every gated-delta mixer."""
        return ()

    @cached_property
    def stacked(self) -> StackedProjections:
        """Every projection of the input, the wide ones first so that rows stay aligned."""
        wide = (self.q_proj, self.k_proj, self.v_proj, self.g_proj, *self.further_projections())
        return StackedProjections((*wide, self.a_proj, self.b_proj))

    @abstractmethod
    def convolve(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        further: Sequence[Tensor],
        history: dict[str, Tensor] | None,
        single: bool,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Short convolutions and SiLU of the projected q, k [B, T, H * K] and v [B, T, H * V], a history advanced in
        place -> q and k side by side [B, T, 2 * H * K], v. `single`: T is 1 and a history is there, a decode step."""

    def inputs(
        self, x: Tensor, history: dict[str, Tensor] | None, single: bool, documents: Documents | None = None
    ) -> tuple[Tensor, ...]:
        """x [B, T, C] -> q, k [B, T, H, K] of norm 1, v [B, T, H, V], log decay and writing strength [B, T, H], fp32
        but for v, and the output gate before its SiLU [B, T, H * V]."""
        q, k, v, gate, *further, decay, beta = self.stacked(x)
        both, v = self.convolve(q, k, v, further, history, single, documents)
        q, k = l2_norm(both.unflatten(-1, (2 * self.heads, self.key_dim))).chunk(2, dim=2)
        decay = -self.A_log.float().exp() * F.softplus(decay.float() + self.dt_bias.float())
        if documents is not None:
            decay = decay.masked_fill(documents.first[..., None], RESET_LOG_DECAY)
        return q, k, v.unflatten(-1, (self.heads, self.value_dim)), decay, beta.float().sigmoid(), gate

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> MixerCache:
        """The state [B, H, K, V], fp32 or bf16 as configured, and the convolutions' histories."""
        size = (batch, self.heads, self.key_dim, self.value_dim)
        kind = torch.float32 if self.config.state_bits == 32 else torch.bfloat16
        state = {"state": torch.zeros(size, device=device, dtype=kind)}
        return MixerCache(context, state, self.new_history(batch, device=device, dtype=dtype))

    def finish(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """Output norm per head, output gate, output projection: [B, T, H, V] and [B, T, H * V] -> [B, T, C]."""
        return self.o_proj(self.o_norm(mixed.to(gate.dtype)).flatten(2) * F.silu(gate))

    def forward(self, x: Tensor, chunk: Chunk, cache: MixerCache | None = None) -> Tensor:
        history, state = (cache.history, cache.state["state"]) if cache else (None, None)
        if fused.usable(x) and chunk.documents is None and self.key_dim <= WIDEST_KEY:
            return self.fused_forward(x, history, state)
        q, k, v, decay, beta, gate = self.inputs(x, history, False, chunk.documents)
        if fused.differentiable(x) and self.key_dim <= WIDEST_TRAINED_KEY:
            q, k = q.to(v.dtype), k.to(v.dtype)
            mixed, new_state = fused.ops().triton_gated_delta(q, k, v, decay, beta, state)
        else:
            before = None if state is None else state.float()
            mixed, new_state = chunked_gated_delta(q, k, v, decay, beta, before)
        if state is not None:
            state.copy_(new_state)
        return self.finish(mixed, gate)

    def fused_forward(self, x: Tensor, history: dict[str, Tensor] | None, state: Tensor | None) -> Tensor:
        """`forward` without a gradient, by Triton kernels between the matrix products."""
        ops, layout = fused.ops(), self.row_layout
        row = F.linear(x, *self.stacked.matrices())
        mixed, v = self.fused_convolve_prompt(row, history)
        q, k, decay, beta = ops.recurrence_inputs(row, layout, self.key_dim, self.A_log, self.dt_bias, mixed)
        output, new_state = ops.triton_gated_delta(q, k, v.unflatten(-1, (self.heads, -1)), decay, beta, state)
        if state is not None:
            state.copy_(new_state)
        return self.o_proj(
            ops.gated_norm(output, row[..., layout.gate : layout.gate + v.shape[-1]], self.o_norm.weight)
        )

    @abstractmethod
    def fused_convolve_prompt(self, row: Tensor, history: dict[str, Tensor] | None) -> tuple[Tensor | None, Tensor]:
        """Short convolutions and SiLU of stacked rows [B, T, P], a history advanced in place -> queries and keys in the
        first 2 H K columns of [B, T, >= 2 H K], or None where they have no convolution; values [B, T, H * V]."""

    @abstractmethod
    def fused_convolve(
        self, row: Tensor, cache: MixerCache, active: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Prepares a fused decode step: either convolves q, k and v in the stacked rows [B, P] in place and returns
        (None, None), or returns the dynamic kernels [B, H * V, W] and the values' history for the kernel to do it.

        Args:
            active: SiLU of the rows' `silu_columns` (see `fused.mix`), where it is there already.
        """

    @cached_property
    def row_layout(self) -> RowLayout:
        """Where the parts of the stacked projections' rows begin."""
        keys, values = self.config.keys, self.config.values
        end = sum(self.stacked.sizes)
        return RowLayout(0, keys, 2 * keys, 2 * keys + values, end - 2 * self.heads, end - self.heads)

    def fused_mix(self, row: Tensor, step: Step, cache: MixerCache, active: Tensor | None = None) -> Tensor:
        """A decode step between the projections: stacked rows [B, P] -> [B, H * V], by one Triton kernel."""
        kernels, history = self.fused_convolve(row, cache, active)
        return fused.ops().recurrent_step(
            row, self.row_layout, cache.state["state"], self.A_log, self.dt_bias, self.o_norm.weight,
            fused.workspace(row.device), kernels, history,
        )  # fmt: skip

    def step(self, x: Tensor, step: Step, cache: MixerCache) -> Tensor:
        if fused.usable(x):
            mixed = fused.mix(self, x[:, 0], step, cache)
            return fused.linear(mixed, self.o_proj.weight)[:, None]
        *rule, gate = self.inputs(x, cache.history, single=True)
        q, k, v, decay, beta = (tensor[:, 0] for tensor in rule)
        mixed = gated_delta_step(q, k, v, decay, beta, cache.state["state"])
        return self.finish(mixed[:, None], gate)

    @classmethod
    def init_from_attention(cls, config: Any, attention: FullAttention) -> Self:
        """Projections from the attention's, key/value heads repeated for their group; the rest as built.

        A head whose dimension differs copies the leading channels; further channels start small and random, with
        zeros in the output projection.
        """
        weight = attention.q_proj.weight
        mixer = cls(config).to(device=weight.device, dtype=weight.dtype)
        source_heads, dim, group = attention.num_heads, attention.head_dim, attention.group
        with torch.no_grad():
            for ours, theirs, size, repeat in (
                (mixer.q_proj, attention.q_proj, mixer.key_dim, 1),
                (mixer.k_proj, attention.k_proj, mixer.key_dim, group),
                (mixer.v_proj, attention.v_proj, mixer.value_dim, group),
            ):
                source = theirs.weight.unflatten(0, (-1, dim)).repeat_interleave(repeat, 0)
                copy_heads(ours.weight.view(mixer.heads, size, -1), source)
            output = mixer.o_proj.weight.zero_().view(-1, mixer.heads, mixer.value_dim).permute(1, 2, 0)
            copy_heads(output, attention.o_proj.weight.view(-1, source_heads, dim).permute(1, 2, 0))
        return mixer


def copy_heads(ours: Tensor, source: Tensor) -> None:
    """Copies the leading part of [H, D, C] into [H', D', C]; the rest of `ours` stays."""
    heads, dim = min(ours.shape[0], source.shape[0]), min(ours.shape[1], source.shape[1])
    ours[:heads, :dim] = source[:heads, :dim]


def l2_norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, computed and returned in fp32."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()
