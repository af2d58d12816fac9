"""G with weights: Gated DeltaNet (arXiv 2412.06464); the convolutions that D and K share with it."""

from __future__ import annotations

from typing import Any, Self

import torch
from nasbench_kernels.conv import short_conv, short_conv_step
from torch import Tensor, nn

from nasbench.model import fused
from nasbench.model.meta import Meta, StepMeta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.mixer import (
    START_SHARPNESS,
    START_VALUE_SCALE,
    GatedDeltaMixer,
    LinearMixer,
    l2_norm,
)
from nasbench.model.mixers.gated_delta.spec import LinearSpec
from nasbench.model.packed import packed_parameters


class ShortConvolved(LinearMixer):
    """q, k, v = SiLU(conv(x W)), q and k of norm 1; the parameter names are flash-linear-attention's."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        # They hold the weights, [C, 1, W] as published; the arithmetic is in nasbench_kernels.
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            nn.Conv1d(channels, channels, spec.conv_size, groups=channels, bias=False)
            for channels in (spec.keys, spec.keys, spec.values)
        )
        self.packed_taps: Tensor | None = None

    def taps(self) -> Tensor:
        """The three convolutions' weights side by side, [2 H K + H V, W]. Where nothing learns, the parameters are
        views of it from now on, unless projections stay unpacked."""
        weights = [part.weight for part in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
        if self.packed.unpacked or torch.is_grad_enabled():
            return torch.cat(weights)[:, 0]
        self.packed_taps = packed_parameters(self.packed_taps, weights)
        return self.packed_taps[:, 0]

    def vectors(
        self, parts: dict[str, Tensor], meta: Meta, past: Tensor | None, kernels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        # One convolution over the channels of all three: a third of the small operations.
        projected = torch.cat((parts["q"], parts["k"], parts["v"]), dim=-1)
        if isinstance(meta, StepMeta):
            assert past is not None
            mixed = short_conv_step(projected, self.taps(), past)
        elif kernels:
            ages = None if meta.documents is None else meta.documents.ages
            mixed = fused.ops().triton_short_conv(projected, self.taps(), past, ages)
        else:
            reach = None if meta.documents is None else meta.documents.reach(self.spec.conv_size)
            mixed = short_conv(projected, self.taps(), past, reach)
        both, v = mixed.split((2 * self.spec.keys, self.spec.values), dim=-1)
        q, k = l2_norm(both.unflatten(-1, (2 * self.heads, -1))).chunk(2, dim=2)
        return q, k, v.unflatten(-1, (self.heads, -1))

    def decode_convolve(self, row: Tensor, past: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.taps(), past

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """As every linear mixer; the convolutions start as a scaling, tap W-1 being the current token."""
        mixer = super().init_from_attention(spec, attention)
        with torch.no_grad():
            for convolution in (mixer.q_conv1d, mixer.k_conv1d):
                convolution.weight.zero_()[..., -1] = START_SHARPNESS
            mixer.v_conv1d.weight.zero_()[..., -1] = START_VALUE_SCALE
        return mixer


class GatedDeltaNet(ShortConvolved, GatedDeltaMixer):
    """Decay exp(-exp(A_log) softplus(x Wa + dt_bias)) and beta = sigmoid(x Wb) per head, output gate SiLU(x Wg)."""

    @property
    def inputs(self) -> dict[str, nn.Linear]:
        return {
            "q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "gate": self.g_proj, "decay": self.a_proj,
            "beta": self.b_proj,
        }  # fmt: skip

    def prefill_convolve(self, row: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        taps = self.taps()
        mixed = fused.ops().triton_short_conv(row[..., : len(taps)], taps, past)
        return mixed, mixed[..., 2 * self.spec.keys :].contiguous()
