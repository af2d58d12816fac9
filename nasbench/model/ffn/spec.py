"""Specifications of FFNs: `gated`, `moe@128x8x768+2`, `channelmix@8192`, `none`. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.core.errors import UserError
from nasbench.core.sizes import is_count
from nasbench.model.spec import FFNSpec, parse_ints

if TYPE_CHECKING:
    from nasbench.model.block import Block

_MIXTURE = re.compile(r"(\d+)x(\d+)x(\d+)(?:\+(\d+))?(:raw)?")


@dataclass(frozen=True)
class GatedFFNSpec(FFNSpec):
    """down(activation(gate(x)) * up(x))."""

    intermediate_size: int
    activation: str = "silu"

    kind: ClassVar[str] = "gated"
    title: ClassVar[str] = "gated FFN"

    @classmethod
    def parse(cls, hidden_size: int, intermediate_size: int, activation: str, args: str) -> Self:
        if args and not (is_count(args) and int(args) > 0):
            raise UserError(f"bad arguments {args!r} of FFN kind gated: write its width, a positive whole number")
        return cls(hidden_size, int(args or intermediate_size), activation)

    @property
    def args(self) -> str:
        return str(self.intermediate_size)

    def parameters(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    def kept_bytes(self, tokens: int, dtype_bytes: int = 2, trained: bool = True) -> int:
        """Gate and up; trained also the input, their product, and the weights that were joined."""
        joined = self.hidden_size * (tokens + 2 * self.intermediate_size) + tokens * self.intermediate_size
        return dtype_bytes * (2 * tokens * self.intermediate_size + trained * joined)

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.ffn.gated import GatedFFN

        return GatedFFN


@dataclass(frozen=True)
class MixtureSpec(FFNSpec):
    """A mixture of experts: every token passes through the `chosen` gated experts that its router scores highest, and
    through the shared ones.

    Attributes:
        width: of each expert.
        shared: experts' widths of one gated FFN that every token passes through.
        normalised: the chosen experts' weights are scaled to a sum of 1; `:raw` leaves the softmax over all experts.
    """

    experts: int
    chosen: int
    width: int
    shared: int = 0
    normalised: bool = True
    activation: str = "silu"

    kind: ClassVar[str] = "moe"
    title: ClassVar[str] = "mixture of experts"

    @classmethod
    def parse(cls, hidden_size: int, intermediate_size: int, activation: str, args: str) -> Self:
        match = _MIXTURE.fullmatch(args)
        experts, chosen, width, shared = (int(n or 0) for n in match.groups()[:4]) if match else (0, 0, 0, 0)
        if not match or not 1 <= chosen <= experts or width < 1:
            raise UserError(
                f"bad arguments {args!r} of FFN kind moe: write experts x chosen x width, optionally +shared and :raw, "
                "as moe@128x8x768+2"
            )
        return cls(hidden_size, experts, chosen, width, shared, match[5] is None, activation)

    @property
    def args(self) -> str:
        shared = f"+{self.shared}" if self.shared else ""
        return f"{self.experts}x{self.chosen}x{self.width}{shared}{'' if self.normalised else ':raw'}"

    def expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.width

    def parameters(self) -> int:
        return self.hidden_size * self.experts + (self.experts + self.shared) * self.expert_parameters()

    def product_parameters(self) -> int:
        return self.hidden_size * self.experts + (self.chosen + self.shared) * self.expert_parameters()

    def kept_bytes(self, tokens: int, dtype_bytes: int = 2, trained: bool = True) -> int:
        """Of every chosen expert gate and up, SiLU of the gate, and the output that the router weighs; the router's
        softmax in fp32, and where each token goes."""
        chosen = self.chosen * (3 * self.width + self.hidden_size) + 2 * self.shared * self.width
        joined = self.hidden_size + self.chosen * (self.hidden_size + self.width)
        return tokens * (dtype_bytes * (chosen + trained * joined) + 4 * self.experts + 24 * self.chosen)

    def weight_bytes(self, tokens: int, dtype_bytes: int = 2) -> int:
        """The experts that `tokens` tokens are expected to hit when each chooses evenly at random."""
        hit = self.experts * (1 - (1 - self.chosen / self.experts) ** tokens)
        rest = self.hidden_size * self.experts + self.shared * self.expert_parameters()
        return round(rest + hit * self.expert_parameters()) * dtype_bytes

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.ffn.moe import MixtureOfExperts

        return MixtureOfExperts


@dataclass(frozen=True)
class ChannelMixSpec(FFNSpec):
    """RWKV7's channel mixing (arXiv 2503.14456): value(relu(key(x + (x' - x) mix))^2), x' the token before."""

    width: int

    kind: ClassVar[str] = "channelmix"
    title: ClassVar[str] = "RWKV7 channel mixing"

    @classmethod
    def parse(cls, hidden_size: int, intermediate_size: int, activation: str, args: str) -> Self:
        return cls(hidden_size, *parse_ints(cls.kind, args or str(intermediate_size), ("width",)))

    @property
    def args(self) -> str:
        return str(self.width)

    def conv_state_bytes(self, batch: int, dtype_bytes: int = 2) -> int:
        return batch * self.hidden_size * dtype_bytes

    def traffic_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return 2 * self.conv_state_bytes(batch, dtype_bytes)

    def parameters(self) -> int:
        return self.hidden_size * (2 * self.width + 1)

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.ffn.channel_mix import ChannelMix

        return ChannelMix


@dataclass(frozen=True)
class NoFFNSpec(FFNSpec):
    """No FFN at all, as in Mamba2."""

    kind: ClassVar[str] = "none"
    title: ClassVar[str] = "no FFN"

    @classmethod
    def parse(cls, hidden_size: int, intermediate_size: int, activation: str, args: str) -> Self:
        if args:
            raise UserError(f"bad arguments {args!r} of FFN kind none: it takes none")
        return cls(hidden_size)

    @property
    def args(self) -> str:
        return ""

    def parameters(self) -> int:
        return 0

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.ffn.gated import NoFFN

        return NoFFN
