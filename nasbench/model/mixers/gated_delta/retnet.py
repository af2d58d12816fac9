"""T with weights: RetNet's multi-scale retention (arXiv 2307.08621)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from nasbench.model import fused
from nasbench.model.meta import Meta, StepMeta
from nasbench.model.mixers.gated_delta.mixer import WIDEST_KEY, WIDEST_TRAINED_KEY, LinearMixer, Recurrence
from nasbench.model.mixers.gated_delta.spec import LinearSpec
from nasbench.model.rotary import apply_rotary


class Retention(LinearMixer):
    """S_t = gamma S_{t-1} + k_t v_t^T (equation 6) with gamma = 1 - 2^(-5-h) of head h = 0, 1, .. (equation 8); queries
    and keys rotated by the model's own rotary embedding, output gate SiLU(x Wg).

    The parameter names are flash-linear-attention's, but for the output norm's.
    """

    decay_sign: ClassVar[float] = 0.0
    unit: ClassVar[bool] = False

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.rotated = replace(spec.shape, head_dim=spec.key_dim)

    def add_gates(self, hidden: int) -> None:
        self.g_proj = nn.Linear(hidden, self.spec.values, bias=False)
        self.fix_decays(-torch.log1p(-(2.0 ** (-5 - torch.arange(self.heads).double()))))

    @property
    def inputs(self) -> dict[str, nn.Linear]:
        return {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "gate": self.g_proj}

    def parts(self, row: Tensor) -> dict[str, Tensor]:
        return super().parts(row) | {"row": row}

    def vectors(
        self, parts: dict[str, Tensor], meta: Meta, past: Tensor | None, kernels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = meta.rotary(self.rotated)
        if kernels and self.key_dim == self.value_dim:
            return fused.ops().rotary(parts["row"], cos, sin, self.heads, self.heads)
        cos, sin = cos[..., None, :], sin[..., None, :]
        q, k = (apply_rotary(parts[name].unflatten(-1, (self.heads, -1)), cos, sin) for name in "qk")
        return q, k, parts["v"].unflatten(-1, (self.heads, -1))

    def tables(self, meta: StepMeta) -> tuple[Tensor, Tensor]:
        cos, sin = (table[:, 0] for table in meta.rotary(self.rotated))
        return cos, sin

    def fast_chunks(self, row: Tensor) -> Recurrence | None:
        return _by_mamba2 if self.key_dim <= (WIDEST_TRAINED_KEY if torch.is_grad_enabled() else WIDEST_KEY) else None


def _by_mamba2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: None, state: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba2's recurrence with a step size of 1 is retention over a transposed state."""
    from nasbench_kernels.mamba2.prefill import triton_mamba2

    past = None if state is None else state.mT.contiguous()
    mixed, new_state = triton_mamba2(v, torch.ones_like(g), g, k, q * q.shape[-1] ** -0.5, None, past)
    return mixed, new_state.mT
