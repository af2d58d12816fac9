"""A token mixer that another package adds."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from nasbench.model.block import Block, BlockCache
from nasbench.model.packed import PackedProjections
from nasbench.model.spec import MixerSpec, parse_ints


@dataclass(frozen=True)
class MeanSpec(MixerSpec):
    """Z: the mean of every value so far, through a bottleneck."""

    width: int = 8
    kind: ClassVar[str] = "Z"
    title: ClassVar[str] = "running mean"

    @classmethod
    def parse(cls, shape, args):
        return cls(shape, *parse_ints("Z", args or "8", ("width",)))

    @property
    def args(self):
        return str(self.width)

    def cache_bytes(self, batch, context, dtype_bytes=2):
        return batch * (self.width + 1) * 4

    def parameters(self):
        return 2 * self.shape.hidden_size * self.width

    def flops(self, tokens, context):
        return 2 * tokens * self.parameters()

    @classmethod
    def block_class(cls):
        return Mean


class Mean(Block):
    def __init__(self, spec):
        super().__init__(spec)
        self.v_proj = nn.Linear(spec.shape.hidden_size, spec.width, bias=False)
        self.o_proj = nn.Linear(spec.width, spec.shape.hidden_size, bias=False)
        self.packed = PackedProjections((self.v_proj,))

    @property
    def out(self):
        return self.o_proj

    def new_cache(self, batch, context, *, device, dtype):
        shape = (batch, self.spec.width + 1)
        return BlockCache(context, {"sum": torch.zeros(shape, device=device, dtype=torch.float32)})

    def core(self, row, meta, cache=None):
        v = row.float()
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        total = v.cumsum(1)
        if cache is not None:
            total = total + cache.state["sum"][:, None]
            cache.state["sum"].copy_(total[:, -1])
        return (total[..., :-1] / total[..., -1:]).to(row.dtype)

    @classmethod
    def init_from_attention(cls, spec, attention):
        weight = attention.v_proj.weight
        mixer = cls(spec).to(weight.device, weight.dtype)
        with torch.no_grad():
            mixer.v_proj.weight.copy_(weight[: spec.width])
        return mixer
