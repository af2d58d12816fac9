"""J with weights: JetBlock (arXiv 2508.15884), a convolution on the values with a kernel made from each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from nasbench_kernels.conv import short_conv, short_conv_step
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import MixerCache
from nasbench.model.documents import Documents
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.mixer import START_SHARPNESS, START_VALUE_SCALE, GatedDeltaMixer
from nasbench.model.mixers.gated_delta.spec import JetBlockSpec
from nasbench.model.spec import MixerSpec


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

    config: JetBlockSpec
    config_class: ClassVar[type[MixerSpec]] = JetBlockSpec

    def __init__(self, config: JetBlockSpec) -> None:
        super().__init__(config)
        self.dynamic_conv1d = DynamicConvolution(
            config.shape.hidden_size, config.generator_size, config.values, config.conv_size
        )

    def new_history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        size = (batch, self.config.conv_size - 1, self.config.values)
        return {"values": torch.zeros(size, device=device, dtype=dtype)}

    def further_projections(self) -> Sequence[nn.Linear]:
        return (self.dynamic_conv1d.kernel_generator.w1,)

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
        kernels = self.dynamic_conv1d.kernel_generator(further[0])
        if not single and fused.differentiable(v):
            ages = None if documents is None else documents.ages
            past = history["values"] if history else None
            return F.silu(torch.cat((q, k), dim=-1)), fused.ops().triton_short_conv(v, kernels, past, ages)
        if documents is not None:
            kernels.mul_(documents.reach(self.config.conv_size)[:, :, None].to(kernels.dtype))
        if single and history is not None:
            values = short_conv_step(v, kernels, history["values"])
        else:
            values = short_conv(v, kernels, history["values"] if history else None)
        return F.silu(torch.cat((q, k), dim=-1)), values

    @property
    def silu_columns(self) -> tuple[int, int]:
        """Begin and size of what the kernels are generated from, in the stacked rows."""
        return 2 * (self.config.keys + self.config.values), self.config.generator_size

    def fused_convolve(self, row: Tensor, cache: MixerCache, active: Tensor | None) -> tuple[Tensor, Tensor]:
        generator = self.dynamic_conv1d.kernel_generator
        at, size = self.silu_columns
        if row.shape[0] == 1:
            flat = fused.ops().gemv(row[:, at : at + size], generator.w2.weight, generator.w2.bias, before="silu")
        else:
            active = fused.ops().silu_part(row, at, size) if active is None else active
            flat = fused.linear(active, generator.w2.weight, generator.w2.bias)
        return flat.view(row.shape[0], self.config.values, -1), cache.history["values"]

    def fused_convolve_prompt(self, row: Tensor, history: dict[str, Tensor] | None) -> tuple[None, Tensor]:
        generator, (at, size) = self.dynamic_conv1d.kernel_generator, self.silu_columns
        kernels = generator(row[..., at : at + size])
        past = history["values"] if history else None
        values = row[..., self.row_layout.v : self.row_layout.v + self.config.values]
        return None, fused.ops().triton_short_conv(values, kernels, past)

    @classmethod
    def init_from_attention(cls, config: Any, attention: FullAttention) -> Self:
        """As every gated-delta mixer; the static kernel starts as a scaling, tap W-1 being the current token.

        Queries and keys have no convolution, so that their scale goes into the projections.
        """
        mixer = super().init_from_attention(config, attention)
        with torch.no_grad():
            mixer.dynamic_conv1d.kernel_generator.w2.bias.zero_().view(-1, config.conv_size)[:, -1] = START_VALUE_SCALE
            mixer.q_proj.weight.mul_(START_SHARPNESS)
            mixer.k_proj.weight.mul_(START_SHARPNESS)
        return mixer
