"""G with weights: Gated DeltaNet (arXiv 2412.06464), static short convolutions on queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from nasbench_kernels.conv import short_conv, short_conv_step
from torch import Tensor, nn

from nasbench.model import fused
from nasbench.model.block import BlockCache
from nasbench.model.documents import Documents
from nasbench.model.meta import SequenceMeta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.mixer import START_SHARPNESS, START_VALUE_SCALE, GatedDeltaMixer, l2_norm
from nasbench.model.mixers.gated_delta.spec import GatedDeltaNetSpec
from nasbench.model.packed import packed_parameters


class ShortConvolution(nn.Module):
    """Weights of a causal depthwise convolution, [C, 1, W] as published; the arithmetic is in nasbench_kernels."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = taps**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-bound, bound))


class GatedDeltaNet(GatedDeltaMixer):
    """q, k, v = SiLU(conv(x W)); the parameter names are flash-linear-attention's."""

    spec: GatedDeltaNetSpec

    def __init__(self, spec: GatedDeltaNetSpec) -> None:
        super().__init__(spec)
        self.q_conv1d = ShortConvolution(spec.keys, spec.conv_size)
        self.k_conv1d = ShortConvolution(spec.keys, spec.conv_size)
        self.v_conv1d = ShortConvolution(spec.values, spec.conv_size)
        self.packed_taps: Tensor | None = None

    def new_conv_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        channels = 2 * self.spec.keys + self.spec.values
        return {"qkv": torch.zeros(batch, self.spec.conv_size - 1, channels, device=device, dtype=dtype)}

    def all_taps(self) -> Tensor:
        """The three convolutions' weights side by side, [2 H K + H V, W]; gradients reach each."""
        return torch.cat((self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight))[:, 0]

    def convolve(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        further: Sequence[Tensor],
        conv_state: dict[str, Tensor] | None,
        single: bool,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor]:
        # One convolution over the channels of all three: a third of the small operations.
        projected, weight = torch.cat((q, k, v), dim=-1), self.all_taps()
        if single and conv_state is not None:
            mixed = short_conv_step(projected, weight, conv_state["qkv"])
        else:
            reach = documents.reach(self.spec.conv_size) if documents is not None else None
            mixed = short_conv(projected, weight, conv_state["qkv"] if conv_state else None, reach)
        both, values = mixed.split((2 * self.spec.keys, self.spec.values), dim=-1)
        return both, values

    def train_inputs(self, row: Tensor, meta: SequenceMeta) -> tuple[Tensor, ...]:
        q, k, v, gate, decay, beta = self.packed.split(row)
        ages = None if meta.documents is None else meta.documents.ages
        mixed = fused.ops().triton_short_conv(torch.cat((q, k, v), dim=-1), self.all_taps(), None, ages)
        both, v = mixed.split((2 * self.spec.keys, self.spec.values), dim=-1)
        q, k = l2_norm(both.unflatten(-1, (2 * self.heads, self.key_dim))).to(v.dtype).chunk(2, dim=2)
        return q, k, v.unflatten(-1, (self.heads, -1)), *self.gates(decay, beta, meta), gate

    def taps(self) -> Tensor:
        """As `all_taps`; the parameters are views of it from now on, unless projections stay unpacked."""
        if self.packed.unpacked:
            return self.all_taps()
        weights: list[Tensor] = [part.weight for part in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
        self.packed_taps = packed_parameters(self.packed_taps, weights)
        return self.packed_taps[:, 0]

    def decode_convolve(self, row: Tensor, cache: BlockCache, active: Tensor | None) -> tuple[None, None]:
        fused.ops().conv_step(row, self.taps(), cache.conv_state["qkv"])
        return None, None

    def prefill_convolve(self, row: Tensor, conv_state: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        taps = self.taps()
        mixed = fused.ops().triton_short_conv(row[..., : len(taps)], taps, conv_state["qkv"] if conv_state else None)
        return mixed, mixed[..., 2 * self.spec.keys :].contiguous()

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """As every gated-delta mixer; the convolutions start as a scaling, tap W-1 being the current token."""
        mixer = super().init_from_attention(spec, attention)
        with torch.no_grad():
            for convolution in (mixer.q_conv1d, mixer.k_conv1d):
                convolution.weight.zero_()[..., -1] = START_SHARPNESS
            mixer.v_conv1d.weight.zero_()[..., -1] = START_VALUE_SCALE
        return mixer
