"""Specifications of the gated-delta family: G, Gated DeltaNet (arXiv 2412.06464), and J, JetBlock (arXiv 2508.15884).

Both keep one matrix of key_dim x value_dim per head, in fp32 unless asked otherwise, and update it by the gated delta
rule. They differ in what stands before it: G convolves queries, keys and values with static kernels; J convolves the
values alone, with a kernel that a small network makes from each token.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.core.errors import UserError
from nasbench.model.spec import LayerShape, MixerSpec, parse_ints

if TYPE_CHECKING:
    from nasbench.model.block import Block

STATE_BITS = (32, 16)
"""Of an element of the recurrent state: fp32, as published checkpoints were trained, or bf16."""


@dataclass(frozen=True)
class GatedDeltaSpec(MixerSpec):
    """Heads, dimensions and convolution width that both kinds share. Default heads: those of the attention, with
    key and value dimension equal to its head dimension, so that every projection can start from the attention's."""

    num_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    conv_size: int = 4
    state_bits: int = 32

    recurrent: ClassVar[bool] = True

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        args = args or f"{shape.num_heads}x{shape.head_dim}x{shape.head_dim}"
        names = ("heads", "key_dim", "value_dim", "state bits")
        heads, key_dim, value_dim, *bits = parse_ints(cls.kind, args, names if args.count("x") > 2 else names[:3])
        if bits and bits[0] not in STATE_BITS:
            raise UserError(
                f"bad arguments {args!r} of layer kind {cls.kind}: the state has 32 bits (fp32) or 16 (bf16)"
            )
        return cls(shape, heads, key_dim, value_dim, cls.conv_size, *bits)

    @property
    def args(self) -> str:
        bits = "" if self.state_bits == STATE_BITS[0] else f"x{self.state_bits}"
        return f"{self.num_heads}x{self.key_dim}x{self.value_dim}{bits}"

    @property
    def keys(self) -> int:
        """Key (and query) channels of all heads."""
        return self.num_heads * self.key_dim

    @property
    def values(self) -> int:
        """Value channels of all heads."""
        return self.num_heads * self.value_dim

    @property
    @abstractmethod
    def conv_channels(self) -> int:
        """Channels of the short convolutions."""

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return batch * self.num_heads * self.key_dim * self.value_dim * self.state_bits // 8

    def conv_state_bytes(self, batch: int, dtype_bytes: int = 2) -> int:
        return batch * (self.conv_size - 1) * self.conv_channels * dtype_bytes

    def traffic_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return 2 * (self.cache_bytes(batch, context, dtype_bytes) + self.conv_state_bytes(batch, dtype_bytes))

    def parameters(self) -> int:
        """q, k, v, beta, decay, output gate, output; A_log and dt_bias; the output norm's weight; convolutions."""
        hidden, gates = self.shape.hidden_size, 2 * self.num_heads
        projections = hidden * (2 * self.keys + 3 * self.values + gates)
        return projections + gates + self.value_dim + self.conv_channels * self.conv_size

    def flops(self, tokens: int, context: int) -> int:
        """The products; decay, read, write and output of the state, 8 a state element and token."""
        return tokens * (2 * self.parameters() + 8 * self.num_heads * self.key_dim * self.value_dim)


@dataclass(frozen=True)
class GatedDeltaNetSpec(GatedDeltaSpec):
    """G: static causal convolutions on q, k and v."""

    kind: ClassVar[str] = "G"
    title: ClassVar[str] = "Gated DeltaNet"

    @property
    def conv_channels(self) -> int:
        return 2 * self.keys + self.values

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.gated_delta.gated_delta_net import GatedDeltaNet

        return GatedDeltaNet


@dataclass(frozen=True)
class JetBlockSpec(GatedDeltaSpec):
    """J: a dynamic causal convolution on v, none on q and k."""

    generator_reduction: int = 8

    kind: ClassVar[str] = "J"
    title: ClassVar[str] = "JetBlock"

    @property
    def conv_channels(self) -> int:
        return self.values

    @property
    def generator_size(self) -> int:
        """Width of the kernel generator's middle layer."""
        return max(1, self.values // self.generator_reduction)

    def parameters(self) -> int:
        taps = self.values * self.conv_size
        return super().parameters() + self.generator_size * (self.shape.hidden_size + taps)

    def flops(self, tokens: int, context: int) -> int:
        return super().flops(tokens, context) + 2 * tokens * self.values * self.conv_size

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.gated_delta.jet_block import JetBlock

        return JetBlock
