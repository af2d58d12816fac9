"""J with weights: JetBlock (arXiv 2508.15884), a convolution on the values with a kernel made from each token."""

from __future__ import annotations

from typing import Any, Self

import torch
from nasbench_kernels.conv import short_conv, short_conv_step
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import SiluColumns
from nasbench.model.documents import RESET_LOG_DECAY
from nasbench.model.meta import Meta, SequenceMeta, StepMeta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.mixer import START_SHARPNESS, START_VALUE_SCALE, GatedDeltaMixer, l2_norm
from nasbench.model.mixers.gated_delta.spec import JetBlockSpec


class KernelGenerator(nn.Module):
    """hidden -> generator_size -> SiLU -> channels * taps, channel-major. The second layer's bias is the static kernel.

    The second layer's weight starts at zero: the convolution starts static, and its first gradient moves that weight.
    """

    def __init__(self, hidden: int, size: int, channels: int, taps: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, size, bias=False)
        self.w2 = nn.Linear(size, channels * taps, bias=True)
        self.taps = taps
        nn.init.zeros_(self.w2.weight)
        nn.init.uniform_(self.w2.bias, -(taps**-0.5), taps**-0.5)

    def forward(self, middle: Tensor) -> Tensor:
        """w1's output [B, T, size] -> kernels [B, T, channels, taps]. The mixer computes w1 with its projections."""
        return self.w2(F.silu(middle)).unflatten(-1, (-1, self.taps))


class DynamicConvolution(nn.Module):
    """Holds the generator under its published name; the arithmetic is in nasbench_kernels."""

    def __init__(self, hidden: int, size: int, channels: int, taps: int) -> None:
        super().__init__()
        self.kernel_generator = KernelGenerator(hidden, size, channels, taps)


class JetBlock(GatedDeltaMixer):
    """q, k = SiLU(x W), v = SiLU(dynamic convolution of x Wv); the parameter names are the published ones."""

    spec: JetBlockSpec
    epilogue: SiluColumns

    def __init__(self, spec: JetBlockSpec) -> None:
        super().__init__(spec)
        self.dynamic_conv1d = DynamicConvolution(
            spec.shape.hidden_size, spec.generator_size, spec.values, spec.conv_size
        )
        # What the convolution's weights are generated from stands behind q, k, v and the gate.
        self.epilogue = SiluColumns(2 * (spec.keys + spec.values), spec.generator_size)

    @property
    def inputs(self) -> dict[str, nn.Linear]:
        return {
            "q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "gate": self.g_proj,
            "middle": self.dynamic_conv1d.kernel_generator.w1, "decay": self.a_proj, "beta": self.b_proj,
        }  # fmt: skip

    def vectors(
        self, parts: dict[str, Tensor], meta: Meta, past: Tensor | None, kernels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        v, weight = parts["v"], self.dynamic_conv1d.kernel_generator(parts["middle"])
        if isinstance(meta, StepMeta):
            assert past is not None
            v = short_conv_step(v, weight, past)
        elif kernels:
            v = fused.ops().triton_short_conv(v, weight, past, None if meta.documents is None else meta.documents.ages)
        else:
            if meta.documents is not None:
                weight.mul_(meta.documents.reach(self.spec.conv_size)[:, :, None].to(weight.dtype))
            v = short_conv(v, weight, past)
        q, k = (l2_norm(F.silu(parts[name]).unflatten(-1, (self.heads, -1))) for name in "qk")
        return q, k, v.unflatten(-1, (self.heads, -1))

    def train_inputs(self, row: Tensor, meta: SequenceMeta) -> tuple[Tensor, ...]:
        values = self.spec.values
        q, k, decay, beta, v, gate, middle = fused.ops().training_inputs(
            row, self.A_log, self.dt_bias, self.heads, self.key_dim, (values, values, self.spec.generator_size)
        )
        ages = None
        if meta.documents is not None:
            ages = meta.documents.ages
            decay = decay.masked_fill(meta.documents.first[..., None], RESET_LOG_DECAY)
        v = fused.ops().triton_short_conv(v, self.dynamic_conv1d.kernel_generator(middle), None, ages)
        return q, k, v.unflatten(-1, (self.heads, -1)), decay, beta, gate

    def decode_convolve(self, row: Tensor, past: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        generator, at, size = self.dynamic_conv1d.kernel_generator, self.epilogue.begin, self.epilogue.size
        if row.shape[0] == 1:
            flat = fused.ops().gemv(row[:, at : at + size], generator.w2.weight, generator.w2.bias, before="silu")
        else:
            active = fused.ops().silu_part(row, at, size) if active is None else active
            flat = fused.linear(active, generator.w2.weight, generator.w2.bias)
        return flat.view(row.shape[0], self.spec.values, -1), past

    def prefill_convolve(self, row: Tensor, past: Tensor | None) -> tuple[None, Tensor]:
        at, size = self.epilogue.begin, self.epilogue.size
        weight = self.dynamic_conv1d.kernel_generator(row[..., at : at + size])
        values = row[..., self.row_layout.v : self.row_layout.v + self.spec.values]
        return None, fused.ops().triton_short_conv(values, weight, past)

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """As every gated-delta mixer; the static kernel starts as a scaling, tap W-1 being the current token.

        Queries and keys have no convolution, so that their scale goes into the projections.
        """
        mixer = super().init_from_attention(spec, attention)
        with torch.no_grad():
            mixer.dynamic_conv1d.kernel_generator.w2.bias.zero_().view(-1, spec.conv_size)[:, -1] = START_VALUE_SCALE
            mixer.q_proj.weight.mul_(START_SHARPNESS)
            mixer.k_proj.weight.mul_(START_SHARPNESS)
        return mixer
