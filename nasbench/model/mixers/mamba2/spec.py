"""Specification of M, Mamba2 (arXiv 2405.21060): a head_dim x state matrix per head with one decay per head and token.

B and C are shared by the heads of a group, as keys and queries of linear attention. Published models have one group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.core.errors import UserError
from nasbench.model.spec import STATE_BITS, Dims, LayerShape, MixerSpec, check_state_bits, parse_ints

if TYPE_CHECKING:
    from nasbench.model.block import Block


@dataclass(frozen=True)
class Mamba2Spec(MixerSpec):
    """`80x64x128`: heads, head dimension, state size; one group and an fp32 state. `80x64x128x16`: a bf16 state.
    `9x64x64x9x32`: groups and bits, too.

    The default has the attention's heads and head dimension, and a group for each head, so that x, B and C start from
    its values, keys and queries.
    """

    num_heads: int = 0
    head_dim: int = 0
    state_size: int = 0
    groups: int = 1
    state_bits: int = 32
    conv_size: int = 4

    kind: ClassVar[str] = "M"
    title: ClassVar[str] = "Mamba2"
    recurrent: ClassVar[bool] = True

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        args = args or f"{shape.num_heads}x{shape.head_dim}x{shape.head_dim}x{shape.num_heads}x{STATE_BITS[0]}"
        names = ("heads", "head_dim", "state")
        further = {3: ("state bits",), 4: ("groups", "state bits")}.get(args.count("x"), ())
        heads, dim, size, *rest = parse_ints(cls.kind, args, (*names, *further))
        *group, bits = rest or [STATE_BITS[0]]
        groups = group[0] if group else 1
        check_state_bits(cls.kind, args, bits)
        if heads % groups:
            raise UserError(f"bad arguments {args!r} of layer kind {cls.kind}: {groups} groups do not divide the heads")
        return cls(shape, heads, dim, size, groups, bits)

    @property
    def args(self) -> str:
        sizes = f"{self.num_heads}x{self.head_dim}x{self.state_size}"
        if self.groups > 1:
            return f"{sizes}x{self.groups}x{self.state_bits}"
        return sizes if self.state_bits == STATE_BITS[0] else f"{sizes}x{self.state_bits}"

    @property
    def dims(self) -> Dims:
        """B and C are keys and queries, x the values."""
        return Dims(self.num_heads, self.state_size, self.head_dim, self.conv_size)

    def resized(self, dims: Dims) -> Self:
        """A group for each head stays one."""
        if dims.conv_size != self.conv_size:
            raise UserError(f"the convolution of layer kind {self.kind} sees {self.conv_size} tokens, no other number")
        groups = dims.heads if self.groups == self.num_heads else self.groups
        made = replace(self, num_heads=dims.heads, head_dim=dims.value_dim, state_size=dims.key_dim, groups=groups)
        return self.parse(self.shape, made.args)

    @property
    def inner(self) -> int:
        """Channels of x of all heads."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the short convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_size

    @property
    def projected(self) -> int:
        """Outputs of the input projection: z, x, B, C, dt."""
        return self.inner + self.channels + self.num_heads

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return batch * self.inner * self.state_size * self.state_bits // 8

    def conv_state_bytes(self, batch: int, dtype_bytes: int = 2) -> int:
        return batch * (self.conv_size - 1) * self.channels * dtype_bytes

    def traffic_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return 2 * (self.cache_bytes(batch, context, dtype_bytes) + self.conv_state_bytes(batch, dtype_bytes))

    def parameters(self) -> int:
        """The projections; the convolution and its bias; A_log, dt_bias and D; the norm."""
        projections = self.shape.hidden_size * (self.projected + self.inner)
        return projections + self.channels * (self.conv_size + 1) + 3 * self.num_heads + self.inner

    def flops(self, tokens: int, context: int) -> int:
        """Products, and decay, write and output of the state: 5 a state element and token."""
        return tokens * (2 * self.parameters() + 5 * self.inner * self.state_size)

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.mamba2.mixer import Mamba2

        return Mamba2
