"""D with weights: DeltaNet (arXiv 2406.06484), Gated DeltaNet without decay and output gate."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from nasbench.model.mixers.gated_delta.gated_delta_net import GatedDeltaNet


class DeltaNet(GatedDeltaNet):
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T (equation 3), beta = sigmoid(x Wb); y = RMSNorm(o) Wo."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ()
    decay_sign: ClassVar[float] = 0.0
    gate: ClassVar[str] = ""

    def add_gates(self, hidden: int) -> None:
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.fix_decays(torch.zeros(self.heads))

    @property
    def inputs(self) -> dict[str, nn.Linear]:
        return {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "beta": self.b_proj}
