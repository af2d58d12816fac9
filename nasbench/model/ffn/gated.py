"""The gated FFN of Llama and its relatives, and none at all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nasbench.model.block import Block, BlockCache, Gate
from nasbench.model.ffn.spec import GatedFFNSpec
from nasbench.model.meta import Meta
from nasbench.model.packed import PackedProjections


class GatedFFN(Block):
    """down(activation(gate(x)) * up(x)); the stream computes all but the last product."""

    supports_packed_documents = True

    def __init__(self, spec: GatedFFNSpec) -> None:
        super().__init__(spec)
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)
        self.packed = PackedProjections((self.gate_proj, self.up_proj))
        self.epilogue = Gate(spec.activation)

    @property
    def out(self) -> nn.Linear:
        return self.down_proj

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        return row


class NoFFN(Block):
    """Adds nothing."""

    supports_packed_documents = True

    @property
    def out(self) -> None:
        return None

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        return row

    def run(self, *arguments: Any, **further: Any) -> None:
        pass
