"""K with weights: Kimi Delta Attention (arXiv 2510.26692), the gated delta rule with a decay per key channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from nasbench.model import fused
from nasbench.model.mixers.gated_delta.gated_delta_net import ShortConvolved
from nasbench.model.mixers.gated_delta.mixer import LEARNT_DECAYS, WIDEST_KEY, LowRank, Recurrence
from nasbench.model.mixers.gated_delta.optional import fla_chunks
from nasbench.model.packed import packed_parameters


class KimiDelta(ShortConvolved):
    """S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T (equation 1), with
    alpha = exp(-exp(A_log) softplus(x W1 W2 + dt_bias)) and the output gate sigmoid(x W3 W4 + b)."""

    fp32_parameters: ClassVar[tuple[str, ...]] = LEARNT_DECAYS
    gate: ClassVar[str] = "sigmoid"

    def add_gates(self, hidden: int) -> None:
        keys, values, middle = self.spec.keys, self.spec.values, self.value_dim
        self.f_proj = LowRank(hidden, middle, keys)
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.g_proj = LowRank(hidden, middle, values, bias=True)
        self.packed_wide: Tensor | None = None
        self.learn_decays(self.key_dim)

    @property
    def inputs(self) -> dict[str, nn.Linear]:
        return {
            "q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "decay middle": self.f_proj.narrow,
            "gate middle": self.g_proj.narrow, "beta": self.b_proj,
        }  # fmt: skip

    def decay_input(self, parts: dict[str, Tensor]) -> Tensor:
        return self.f_proj.wide(parts["decay middle"])

    def output_gate(self, parts: dict[str, Tensor]) -> Tensor:
        return self.g_proj.wide(parts["gate middle"])

    def decode_gates(
        self, parts: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Both low-rank gates by one product: their middles stand side by side in the rows, their weights too."""
        pair, sizes = [self.f_proj.wide.weight, self.g_proj.wide.weight], (self.spec.keys, self.spec.values)
        if self.packed.unpacked:
            weight = torch.cat(pair)
        else:
            weight = self.packed_wide = packed_parameters(self.packed_wide, pair)
        middle = parts["decay middle"]
        wide = fused.ops().grouped_gemm(middle, middle.shape[-1], weight, sizes, self.g_proj.wide.bias)
        return *wide.split(sizes, -1), None

    def fast_chunks(self, row: Tensor) -> Recurrence | None:
        return fla_chunks("kda", "chunk_kda", row) if self.key_dim <= WIDEST_KEY else None
