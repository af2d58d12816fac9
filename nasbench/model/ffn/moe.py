"""Mixture of experts: a router sends every token through a few of many gated FFNs (arXiv 1701.06538, 2101.03961).

Experts' weights are stacked, [E, 2 F, C] for gate over up and [E, C, F] for down; checkpoints name them one by one,
which the families translate. N tokens, E experts, K chosen, F width, C hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import ACTIVATIONS, Block, BlockCache
from nasbench.model.ffn.gated import GatedFFN
from nasbench.model.ffn.spec import GatedFFNSpec, MixtureSpec
from nasbench.model.meta import Meta
from nasbench.model.packed import PackedProjections


class MixtureOfExperts(Block):
    """Every token's chosen experts, weighted by the router's softmax, plus the shared experts.

    Routing needs the layer's input itself, so the block does its own products.
    """

    spec: MixtureSpec
    supports_packed_documents = True

    def __init__(self, spec: MixtureSpec) -> None:
        super().__init__(spec)
        self.gate = nn.Linear(spec.hidden_size, spec.experts, bias=False)
        hidden, bound = spec.hidden_size, spec.hidden_size**-0.5
        self.gate_up = nn.Parameter(torch.empty(spec.experts, 2 * spec.width, hidden).uniform_(-bound, bound))
        bound = spec.width**-0.5
        self.down = nn.Parameter(torch.empty(spec.experts, hidden, spec.width).uniform_(-bound, bound))
        self.shared = None
        if spec.shared:
            self.shared = GatedFFN(GatedFFNSpec(spec.hidden_size, spec.shared * spec.width, spec.activation))
        self.packed = PackedProjections((self.gate,))

    @property
    def out(self) -> None:
        return None

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, C] -> weights [N, K] fp32 and experts [N, K] int64 of every token."""
        weights, experts = F.softmax(self.gate(hidden), dim=-1, dtype=torch.float32).topk(self.spec.chosen, dim=-1)
        if self.spec.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts

    def expert(self, hidden: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """hidden [.., n, C] through experts of weights [.., 2 F, C] and [.., C, F]."""
        first, second = (hidden @ gate_up.mT).chunk(2, dim=-1)
        return (ACTIVATIONS[self.spec.activation](first) * second) @ down.mT

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        """Normalised input [B, T, C] -> [B, T, C]."""
        # Grouped products want half precision and rows of 16 bytes.
        grouped = fused.autograd_kernels(row) and row.dtype == torch.bfloat16 and self.spec.width % 8 == 0
        hidden = row.flatten(0, -2)
        output = (self.grouped if grouped else self.by_expert)(hidden, *self.route(hidden))
        if self.shared is not None:
            first, second = self.shared.packed.parts(hidden)
            output = output + self.shared.down_proj(ACTIVATIONS[self.spec.activation](first) * second)
        return output.view_as(row)

    def by_expert(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """hidden [N, C], routed -> [N, C], expert by expert: the plain form."""
        output = torch.zeros_like(hidden)
        for index in experts.unique().tolist():
            token, place = torch.where(experts == index)
            mixed = self.expert(hidden[token], self.gate_up[index], self.down[index])
            output.index_add_(0, token, mixed * weights[token, place, None].to(mixed.dtype))
        return output

    def grouped(self, hidden: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """As `by_expert`, tokens sorted by expert, so that each product runs over all experts at once: shapes do not
        depend on the routing, and nothing waits for the device."""
        order = experts.flatten().argsort(stable=True)
        token = order // self.spec.chosen
        ends = torch.searchsorted(
            experts.flatten()[order], torch.arange(self.spec.experts, device=hidden.device), right=True
        ).to(torch.int32)
        inner = F.grouped_mm(hidden[token], self.gate_up.mT, offs=ends)
        first, second = inner.chunk(2, dim=-1)
        gated = ACTIVATIONS[self.spec.activation](first) * second
        mixed = F.grouped_mm(gated, self.down.mT, offs=ends) * weights.flatten()[order, None].to(hidden.dtype)
        return torch.zeros_like(hidden).index_add_(0, token, mixed)
