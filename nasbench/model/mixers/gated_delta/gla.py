"""L with weights: gated linear attention, GLA (arXiv 2312.06635)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nasbench.model.meta import Meta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.mixer import LinearMixer, LowRank, Recurrence, spread_half_lives
from nasbench.model.mixers.gated_delta.optional import fla_chunks
from nasbench.model.mixers.gated_delta.spec import LOW_RANK

TEMPERATURE = 16.0
"""Log decays are logsigmoid(x) / 16 (section 4.4), so that gates are near 1."""


class GatedLinearAttention(LinearMixer):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T (equation 3), alpha = sigmoid(x W1 W2 + b)^(1/16), the output gate
    SiLU(x Wg).

    The parameter names are flash-linear-attention's, but for the output norm's.
    """

    # logsigmoid(x) = -softplus(-x)
    decay_sign: ClassVar[float] = -1.0
    unit: ClassVar[bool] = False

    def add_gates(self, hidden: int) -> None:
        keys = self.spec.keys
        self.gk_proj = LowRank(hidden, LOW_RANK, keys, bias=True)
        self.g_proj = nn.Linear(hidden, self.spec.values, bias=False)
        self.fix_decays(torch.full((self.heads,), math.log(2) / TEMPERATURE), self.key_dim)

    @property
    def inputs(self) -> dict[str, nn.Linear]:
        return {
            "q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "gate": self.g_proj,
            "decay middle": self.gk_proj.narrow,
        }  # fmt: skip

    def vectors(
        self, parts: dict[str, Tensor], meta: Meta, past: Tensor | None, kernels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (parts[name].unflatten(-1, (self.heads, -1)) for name in "qkv")
        return q, k, v

    def decay_input(self, parts: dict[str, Tensor]) -> Tensor:
        return self.gk_proj.wide(parts["decay middle"])

    def decode_gates(
        self, parts: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        return parts["decay middle"], None, (self.gk_proj.wide.weight, self.gk_proj.wide.bias)

    def fast_chunks(self, row: Tensor) -> Recurrence | None:
        return fla_chunks("gla", "chunk_gla", row)

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """As every linear mixer; half-lives start spread over the heads, all channels of a head alike."""
        mixer = super().init_from_attention(spec, attention)
        # sigmoid(b)^(1/16) halves in t tokens: b = -log(2^(16/t) - 1).
        bias = -torch.expm1(TEMPERATURE * math.log(2) / spread_half_lives(mixer.heads)).log()
        with torch.no_grad():
            mixer.gk_proj.wide.bias.copy_(bias.repeat_interleave(mixer.key_dim))
        return mixer
