"""An FFN that another package adds."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from nasbench.model.block import Block
from nasbench.model.packed import PackedProjections
from nasbench.model.spec import FFNSpec, parse_ints


@dataclass(frozen=True)
class SquareSpec(FFNSpec):
    """down(relu(up(x))^2)."""

    width: int
    kind: ClassVar[str] = "square"
    title: ClassVar[str] = "squared ReLU"

    @classmethod
    def parse(cls, hidden_size, intermediate_size, activation, args):
        return cls(hidden_size, *parse_ints("square", args or str(intermediate_size), ("width",)))

    @property
    def args(self):
        return str(self.width)

    def parameters(self):
        return 2 * self.hidden_size * self.width

    @classmethod
    def block_class(cls):
        return Square


class Square(Block):
    supports_packed_documents = True

    def __init__(self, spec):
        super().__init__(spec)
        self.up = nn.Linear(spec.hidden_size, spec.width, bias=False)
        self.down = nn.Linear(spec.width, spec.hidden_size, bias=False)
        self.register_buffer("power", torch.tensor(2.0), persistent=False)
        self.packed = PackedProjections((self.up,))

    @property
    def out(self):
        return self.down

    def core(self, row, meta, cache=None):
        return F.relu(row) ** self.power
