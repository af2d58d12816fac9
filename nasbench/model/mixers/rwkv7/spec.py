"""Specification of R, RWKV7's time mixing (arXiv 2503.14456): a head_dim x head_dim state per head, one decay per
channel and token, and a removal that goes along a key of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.model.spec import STATE_BITS, LayerShape, MixerSpec, check_state_bits, parse_ints

if TYPE_CHECKING:
    from nasbench.model.block import Block


def _rank(hidden: int, factor: float, exponent: float = 0.5) -> int:
    """Ranks of the low-rank projections as the published models have them (their training code)."""
    return max(32, round(factor * hidden**exponent / 32) * 32)


@dataclass(frozen=True)
class RWKV7Spec(MixerSpec):
    """`32x64`: heads and their dimension, an fp32 state; `32x64x16`: a bf16 state. The default has the attention's
    heads and head dimension."""

    num_heads: int = 0
    head_dim: int = 0
    state_bits: int = STATE_BITS[0]

    kind: ClassVar[str] = "R"
    title: ClassVar[str] = "RWKV7"
    recurrent: ClassVar[bool] = True

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        args = args or f"{shape.num_heads}x{shape.head_dim}"
        heads, dim, *rest = parse_ints(cls.kind, args, ("heads", "head_dim", *["state bits"][: args.count("x") - 1]))
        return cls(shape, heads, dim, check_state_bits(cls.kind, args, *rest))

    @property
    def args(self) -> str:
        bits = "" if self.state_bits == STATE_BITS[0] else f"x{self.state_bits}"
        return f"{self.num_heads}x{self.head_dim}{bits}"

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def ranks(self) -> tuple[int, int, int]:
        """Of the low-rank projections to decay, in-context learning rate and output gate."""
        hidden = self.shape.hidden_size
        return _rank(hidden, 1.8), _rank(hidden, 1.8), _rank(hidden, 0.6, 0.8)

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return batch * self.inner * self.head_dim * self.state_bits // 8

    def conv_state_bytes(self, batch: int, dtype_bytes: int = 2) -> int:
        """The last token's input, which token shift looks back at."""
        return batch * self.shape.hidden_size * dtype_bytes

    def traffic_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return 2 * (self.cache_bytes(batch, context, dtype_bytes) + self.conv_state_bytes(batch, dtype_bytes))

    def parameters(self) -> int:
        """r, k, v, output; the low-rank projections, two with a bias; six token shifts; k_k, k_a, r_k; the norm."""
        hidden, inner = self.shape.hidden_size, self.inner
        return 4 * hidden * inner + sum(self.ranks) * (hidden + inner) + 2 * inner + 6 * hidden + 3 * inner + 2 * inner

    def flops(self, tokens: int, context: int) -> int:
        """Products, and decay, removal, write and output of the state: 9 a state element and token."""
        return tokens * (2 * self.parameters() + 9 * self.inner * self.head_dim)

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.rwkv7.mixer import RWKV7

        return RWKV7
