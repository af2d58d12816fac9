"""G with weights: Gated DeltaNet (arXiv 2412.06464), static short convolutions on queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from nasbench_kernels.conv import short_conv, short_conv_step
from torch import Tensor, nn

from nasbench.model import fused
from nasbench.model.block import MixerCache
from nasbench.model.documents import Documents
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.mixer import START_SHARPNESS, START_VALUE_SCALE, GatedDeltaMixer
from nasbench.model.mixers.gated_delta.spec import GatedDeltaNetSpec, GatedDeltaSpec
from nasbench.model.packed import stacked_parameters
from nasbench.model.spec import MixerSpec


class ShortConvolution(nn.Module):
    """Weights of a causal depthwise convolution, [C, 1, W] as published; the arithmetic is in nasbench_kernels."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = taps**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-bound, bound))


class GatedDeltaNet(GatedDeltaMixer):
    """q, k, v = SiLU(conv(x W)); the parameter names are flash-linear-attention's."""

    config_class: ClassVar[type[MixerSpec]] = GatedDeltaNetSpec

    def __init__(self, config: GatedDeltaSpec) -> None:
        super().__init__(config)
        self.q_conv1d = ShortConvolution(config.keys, config.conv_size)
        self.k_conv1d = ShortConvolution(config.keys, config.conv_size)
        self.v_conv1d = ShortConvolution(config.values, config.conv_size)
        self.stacked_taps: Tensor | None = None

    def new_history(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        channels = 2 * self.config.keys + self.config.values
        return {"qkv": torch.zeros(batch, self.config.conv_size - 1, channels, device=device, dtype=dtype)}

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
        # One convolution over the channels of all three: a third of the small operations.
        projected = torch.cat((q, k, v), dim=-1)
        weight = torch.cat((self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight))[:, 0]
        if single and history is not None:
            mixed = short_conv_step(projected, weight, history["qkv"])
        elif fused.differentiable(projected):
            ages = None if documents is None else documents.ages
            mixed = fused.ops().triton_short_conv(projected, weight, history["qkv"] if history else None, ages)
        else:
            reach = documents.reach(self.config.conv_size) if documents is not None else None
            mixed = short_conv(projected, weight, history["qkv"] if history else None, reach)
        both, values = mixed.split((2 * self.config.keys, self.config.values), dim=-1)
        return both, values

    def taps(self) -> Tensor:
        """The three convolutions' weights as one, [2 H K + H V, W]; the parameters are views of it from now on, unless
        projections stay apart."""
        weights: list[Tensor] = [part.weight for part in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
        if self.stacked.apart:
            return torch.cat(weights)[:, 0]
        self.stacked_taps = stacked_parameters(self.stacked_taps, weights)
        return self.stacked_taps[:, 0]

    def fused_convolve(self, row: Tensor, cache: MixerCache, active: Tensor | None) -> tuple[None, None]:
        fused.ops().conv_step(row, self.taps(), cache.history["qkv"])
        return None, None

    def fused_convolve_prompt(self, row: Tensor, history: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        taps = self.taps()
        mixed = fused.ops().triton_short_conv(row[..., : len(taps)], taps, history["qkv"] if history else None)
        return mixed, mixed[..., 2 * self.config.keys :].contiguous()

    @classmethod
    def init_from_attention(cls, config: Any, attention: FullAttention) -> Self:
        """As every gated-delta mixer; the convolutions start as a scaling, tap W-1 being the current token."""
        mixer = super().init_from_attention(config, attention)
        with torch.no_grad():
            for convolution in (mixer.q_conv1d, mixer.k_conv1d):
                convolution.weight.zero_()[..., -1] = START_SHARPNESS
            mixer.v_conv1d.weight.zero_()[..., -1] = START_VALUE_SCALE
        return mixer
