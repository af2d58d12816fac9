"""J with weights: JetBlock (arXiv 2508.15884), a convolution on the values with a kernel made from each token."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from nasbench_kernels.dynamic_conv import dynamic_conv, dynamic_conv_step
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.blocks.base import MixerConfig
from nasbench.blocks.full_attention_mixer import FullAttention
from nasbench.blocks.gated_delta import JetBlockConfig
from nasbench.blocks.gated_delta_mixer import GatedDeltaMixer, l2_norm


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

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, channels, taps]."""
        return self.w2(F.silu(self.w1(x))).unflatten(-1, (-1, self.taps))


class DynamicConvolution(nn.Module):
    """Holds the generator under its published name; the arithmetic is in nasbench_kernels."""

    def __init__(self, hidden: int, size: int, channels: int, taps: int) -> None:
        super().__init__()
        self.kernel_generator = KernelGenerator(hidden, size, channels, taps)


class JetBlock(GatedDeltaMixer):
    """q, k = SiLU(x W), v = SiLU(dynamic convolution of x Wv); the parameter names are the published ones."""

    config: JetBlockConfig
    config_class: ClassVar[type[MixerConfig]] = JetBlockConfig

    def __init__(self, config: JetBlockConfig) -> None:
        super().__init__(config)
        self.dynamic_conv1d = DynamicConvolution(
            config.shape.hidden_size, config.generator_size, config.values, config.conv_size
        )

    def new_history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        size = (batch, self.config.conv_size - 1, self.config.values)
        return {"values": torch.zeros(size, device=device, dtype=dtype)}

    def inputs(self, x: Tensor, history: dict[str, Tensor] | None, single: bool) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (
            l2_norm(F.silu(project(x)).unflatten(-1, (self.heads, self.key_dim)))
            for project in (self.q_proj, self.k_proj)
        )
        values, kernels = self.v_proj(x), self.dynamic_conv1d.kernel_generator(x)
        if single and history is not None:
            v = dynamic_conv_step(values, kernels, history["values"])
        else:
            v = dynamic_conv(values, kernels, history["values"] if history else None)
        return q, k, v.unflatten(-1, (self.heads, self.value_dim))

    @classmethod
    def init_from_attention(cls, config: Any, attention: FullAttention) -> Self:
        """As every gated-delta mixer; the static kernel starts as the identity, tap W-1 being the current token."""
        mixer = super().init_from_attention(config, attention)
        generator = mixer.dynamic_conv1d.kernel_generator
        with torch.no_grad():
            generator.w2.bias.zero_().view(-1, config.conv_size)[:, -1] = 1.0
        return mixer
