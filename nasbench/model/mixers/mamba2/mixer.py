"""M with weights: Mamba2 (arXiv 2405.21060). The parameter names are those of published checkpoints."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from nasbench_kernels.conv import short_conv, short_conv_step
from nasbench_kernels.mamba2 import chunked_mamba2, mamba2_step
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model.block import Block, BlockCache, with_weights
from nasbench.model.documents import RESET_LOG_DECAY
from nasbench.model.meta import Meta, SequenceMeta, StepMeta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.mixer import (
    START_SHARPNESS,
    START_VALUE_SCALE,
    STEP_SIZE,
    copy_heads,
    heads_of,
    spread_half_lives,
)
from nasbench.model.mixers.mamba2.spec import Mamba2Spec
from nasbench.model.packed import PackedProjections

NORM_EPS = 1e-5
"""Of the output norm, in published checkpoints."""
START_GATE, START_NORM = 2.0, 0.1
"""Where z starts on the layer's inputs, and the norm's weight. A random z gives every channel a random sign. With a
norm of 1, features are larger than the attention's: its output projection on them is worse than zeros. On
SmolLM2-135M with output projections solved (mean of 3 layers), the relative error was 1.20 with neither, 0.77 with the
norm alone and 0.74 with both; G's was 0.76."""
WIDEST_STATE, WIDEST_TRAINED_STATE = 256, 128
"""State sizes up to which the chunked kernels keep their tiles in registers, without and with a backward."""

RecurrenceInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Mamba2(Block):
    """z, x, B, C, dt from one projection; a state per head that x is written to along B and read from along C."""

    spec: Mamba2Spec
    supports_packed_documents: ClassVar[bool] = True
    # bf16 would round the slowest decays to one another.
    fp32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "D")

    def __init__(self, spec: Mamba2Spec) -> None:
        super().__init__(spec)
        hidden, heads = spec.shape.hidden_size, spec.num_heads
        self.in_proj = nn.Linear(hidden, spec.projected, bias=False)
        # Holds the weights; the arithmetic is in nasbench_kernels.
        self.conv1d = nn.Conv1d(spec.channels, spec.channels, spec.conv_size, groups=spec.channels)
        self.dt_bias = nn.Parameter(torch.full((heads,), math.log(math.expm1(STEP_SIZE)), dtype=torch.float32))
        self.A_log = nn.Parameter((math.log(2) / spread_half_lives(heads) / STEP_SIZE).log())
        self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.norm = nn.RMSNorm(spec.inner, eps=NORM_EPS)
        self.out_proj = nn.Linear(spec.inner, hidden, bias=False)
        self.packed = PackedProjections((self.in_proj,))

    @property
    def out(self) -> nn.Linear:
        return self.out_proj

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        """The state [B, H, P, N], fp32 or bf16 as specified, and the convolution's last inputs."""
        spec = self.spec
        size = (batch, spec.num_heads, spec.head_dim, spec.state_size)
        kind = torch.float32 if spec.state_bits == 32 else torch.bfloat16
        conv_state = torch.zeros(batch, spec.conv_size - 1, spec.channels, device=device, dtype=dtype)
        return BlockCache(context, {"state": torch.zeros(size, device=device, dtype=kind)}, {"xbc": conv_state})

    @property
    def conv_bias(self) -> Tensor:
        assert self.conv1d.bias is not None
        return self.conv1d.bias

    @property
    def taps(self) -> Tensor:
        """The convolution's weight, [I + 2 G N, W]."""
        return self.conv1d.weight[:, 0]

    def parts(self, row: Tensor) -> tuple[Tensor, ...]:
        """row [..., at least P] -> z [..., I], the convolution's input [..., I + 2 G N], dt [..., H]."""
        spec = self.spec
        return row[..., : spec.projected].split((spec.inner, spec.channels, spec.num_heads), dim=-1)

    def recurrence_inputs(self, mixed: Tensor, dt: Tensor, meta: Meta) -> RecurrenceInputs:
        """After the convolution: x [B, T, H, P], step size and log decay [B, T, H] fp32, B and C [B, T, G, N]."""
        spec = self.spec
        shared = spec.groups * spec.state_size
        x, b, c = mixed.split((spec.inner, shared, shared), dim=-1)
        b, c = (part.unflatten(-1, (spec.groups, spec.state_size)) for part in (b, c))
        step = F.softplus(dt.float() + self.dt_bias.float())
        decay = -self.A_log.float().exp() * step
        if meta.documents is not None:
            decay = decay.masked_fill(meta.documents.first[..., None], RESET_LOG_DECAY)
        return x.unflatten(-1, (spec.num_heads, spec.head_dim)), step, decay, b, c

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """RMSNorm of y SiLU(z) over the channels of each group: [B, T, H, P] and [B, T, I] -> [B, T, I]."""
        mixed = (y.flatten(2).float() * F.silu(z.float())).unflatten(-1, (self.spec.groups, -1))
        return F.rms_norm(mixed, mixed.shape[-1:], eps=NORM_EPS).flatten(2).to(z.dtype) * self.norm.weight

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        z, columns, dt = self.parts(row)
        if isinstance(meta, StepMeta):
            assert cache is not None
            mixed = short_conv_step(columns, self.taps, cache.conv_state["xbc"], self.conv_bias)
            x, step, decay, b, c = (part[:, 0] for part in self.recurrence_inputs(mixed, dt, meta))
            return self.gated(mamba2_step(x, step, decay, b, c, self.D, cache.state["state"])[:, None], z)
        conv_state, state = (cache.conv_state["xbc"], cache.state["state"]) if cache else (None, None)
        reach = None if meta.documents is None else meta.documents.reach(self.spec.conv_size)
        mixed = short_conv(columns, self.taps, conv_state, reach, self.conv_bias)
        y, new_state = chunked_mamba2(*self.recurrence_inputs(mixed, dt, meta), self.D, state)
        if state is not None:
            state.copy_(new_state)
        return self.gated(y, z)

    def by_kernels(self, row: Tensor, meta: SequenceMeta, cache: BlockCache | None = None) -> Tensor:
        """Convolution and recurrence by kernels that have a backward: row -> [B, T, H, P]."""
        from nasbench_kernels.conv.train import triton_short_conv
        from nasbench_kernels.mamba2.prefill import triton_mamba2

        _, columns, dt = self.parts(row)
        ages = None if meta.documents is None else meta.documents.ages
        conv_state, state = (cache.conv_state["xbc"], cache.state["state"]) if cache else (None, None)
        mixed = triton_short_conv(columns, self.taps, conv_state, ages, self.conv_bias)
        y, new_state = triton_mamba2(*self.recurrence_inputs(mixed, dt, meta), self.D, state)
        if state is not None:
            state.copy_(new_state)
        return y

    def train_core(self, row: Tensor, meta: SequenceMeta) -> Tensor:
        if not torch.is_grad_enabled():
            return self.prefill_core(row, meta)
        if self.spec.state_size > WIDEST_TRAINED_STATE:
            return self.core(row, meta)
        return self.gated(self.by_kernels(row, meta), self.parts(row)[0])

    def prefill_core(self, row: Tensor, meta: SequenceMeta, cache: BlockCache | None = None) -> Tensor:
        if self.spec.state_size > WIDEST_STATE:
            return self.core(row, meta, cache)
        from nasbench_kernels.mamba2.norm import gated_norm_of_groups

        y, rows = self.by_kernels(row, meta, cache), row.flatten(0, 1)
        out = torch.empty(len(rows), self.spec.inner, device=row.device, dtype=row.dtype)
        gated_norm_of_groups(y.view_as(out), rows, self.norm.weight, self.spec.groups, NORM_EPS, out)
        return out.unflatten(0, row.shape[:2])

    def decode_core(self, row: Tensor, meta: StepMeta, cache: BlockCache | None, active: Tensor | None) -> Tensor:
        from nasbench_kernels.mamba2.decode import fused_mamba2_step

        assert cache is not None
        return fused_mamba2_step(
            row, self.taps, self.conv_bias, cache.conv_state["xbc"], cache.state["state"],
            self.A_log, self.dt_bias, self.D, self.norm.weight, eps=NORM_EPS,
        )  # fmt: skip

    def calibration(self, constant: Tensor) -> dict[str, Tensor]:
        """The rows of z, such that it is about START_GATE on the layer's inputs."""
        weight = with_weights(self, lambda mixer: mixer.in_proj.weight.detach().clone())
        weight[: self.spec.inner] = START_GATE * constant
        return {"in_proj.weight": weight}

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """x, B and C from the attention's values, keys and queries: linear attention reads h_t c_t where
        h = sum x b^T. Further channels start small and random, with zeros in the output projection.

        A group has one B and C: of its heads, the first gives them.
        """
        mixer = cls(spec).to(attention.q_proj.weight)
        q, k, v, o = heads_of(attention)
        shared, each = spec.groups * spec.state_size, spec.num_heads // spec.groups
        with torch.no_grad():
            _, x, b, c, _ = mixer.in_proj.weight.split((spec.inner, spec.inner, shared, shared, spec.num_heads))
            copy_heads(x.view(spec.num_heads, spec.head_dim, -1), v)
            copy_heads(b.view(spec.groups, spec.state_size, -1), k[::each])
            copy_heads(c.view(spec.groups, spec.state_size, -1), q[::each])
            output = mixer.out_proj.weight.zero_().view(-1, spec.num_heads, spec.head_dim).permute(1, 2, 0)
            copy_heads(output, o)
            mixer.conv_bias.zero_()
            last = mixer.conv1d.weight.zero_()[..., -1]
            last[: spec.inner] = START_VALUE_SCALE
            last[spec.inner :] = START_SHARPNESS
            mixer.D.zero_()
            mixer.norm.weight.fill_(START_NORM)
        return mixer
