"""Specifications of linear attention with one matrix of key_dim x value_dim per head, in fp32 unless asked otherwise.

| kind | source |
|---|---|
| D DeltaNet | arXiv 2406.06484 |
| G Gated DeltaNet | arXiv 2412.06464 |
| J JetBlock | arXiv 2508.15884 |
| K Kimi Delta Attention | arXiv 2510.26692 |
| L GLA, gated linear attention | arXiv 2312.06635 |
| T RetNet | arXiv 2307.08621 |

`mixer.py` has the equations. Arguments are `heads x key_dim x value_dim`, then the state's bits where they are not 32,
then the convolution's tokens where they are not 4: `12x96x256`, `12x96x256x16`, `12x96x256x32x2`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.core.errors import UserError
from nasbench.model.spec import STATE_BITS, Dims, LayerShape, MixerSpec, check_state_bits, parse_ints

if TYPE_CHECKING:
    from nasbench.model.block import Block

CHUNK = 64
"""Tokens of a chunk of the recurrence in training: each keeps a state and two squares (nasbench_kernels)."""
LOW_RANK = 16
"""Middle channels of GLA's decay."""
CONV_SIZES = range(2, 9)
"""Tokens that a short convolution may see: fewer are none, more need a wider kernel."""


@dataclass(frozen=True)
class LinearSpec(MixerSpec):
    """Heads and dimensions of a state. Default heads: those of the attention, with key and value dimension equal to its
    head dimension, so that every projection can start from the attention's."""

    num_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    conv_size: int = 4
    state_bits: int = 32

    recurrent: ClassVar[bool] = True
    block: ClassVar[str]
    """`module:class` of the block, beside this file."""
    delta: ClassVar[bool] = True
    """Whether the state is written by the delta rule."""

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        args = args or f"{shape.num_heads}x{shape.head_dim}x{shape.head_dim}"
        names = ("heads", "key_dim", "value_dim", "state bits", "convolution")
        sizes = parse_ints(cls.kind, args, names[: max(3, args.count("x") + 1)])
        heads, key_dim, value_dim, bits, conv = sizes + (STATE_BITS[0], cls.conv_size)[len(sizes) - 3 :]
        made = cls(shape, heads, key_dim, value_dim, conv, check_state_bits(cls.kind, args, bits))
        if conv != cls.conv_size and not (made.conv_channels and conv in CONV_SIZES):
            sees = f"sees {CONV_SIZES[0]} to {CONV_SIZES[-1]} tokens" if made.conv_channels else "does not exist"
            raise UserError(f"bad arguments {args!r} of layer kind {cls.kind}: its convolution {sees}")
        return made

    @property
    def args(self) -> str:
        conv = "" if self.conv_size == type(self).conv_size else f"x{self.conv_size}"
        bits = f"x{self.state_bits}" if conv or self.state_bits != STATE_BITS[0] else ""
        return f"{self.num_heads}x{self.key_dim}x{self.value_dim}{bits}{conv}"

    @property
    def dims(self) -> Dims:
        return Dims(self.num_heads, self.key_dim, self.value_dim, self.conv_size)

    def resized(self, dims: Dims) -> Self:
        heads, key_dim, value_dim, conv = dims
        return self.parse(self.shape, f"{heads}x{key_dim}x{value_dim}x{self.state_bits}x{conv}")

    @property
    def keys(self) -> int:
        """Key (and query) channels of all heads."""
        return self.num_heads * self.key_dim

    @property
    def values(self) -> int:
        """Value channels of all heads."""
        return self.num_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the short convolutions: those of queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    @abstractmethod
    def gate_parameters(self) -> int:
        """Parameters of decay, write gate and output gate."""

    @property
    def state_size(self) -> int:
        """Elements of a sequence's state."""
        return self.num_heads * self.key_dim * self.value_dim

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return batch * self.state_size * self.state_bits // 8

    def conv_state_bytes(self, batch: int, dtype_bytes: int = 2) -> int:
        return batch * (self.conv_size - 1) * self.conv_channels * dtype_bytes

    def traffic_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return 2 * (self.cache_bytes(batch, context, dtype_bytes) + self.conv_state_bytes(batch, dtype_bytes))

    def parameters(self) -> int:
        """Projections of queries, keys, values and output; gates; convolutions; the output norm's weight."""
        projections = self.shape.hidden_size * 2 * (self.keys + self.values)
        return projections + self.gate_parameters + self.conv_channels * self.conv_size + self.value_dim

    def flops(self, tokens: int, context: int) -> int:
        """The products; decay, write and output of the state, and its read by the delta rule: 2 each a state element
        and token."""
        return tokens * (2 * self.parameters() + (8 if self.delta else 6) * self.state_size)

    @property
    def row_size(self) -> int:
        """Outputs of all projections of the input."""
        return (self.parameters() - self.shape.hidden_size * self.values) // self.shape.hidden_size

    @property
    def convolved_size(self) -> int:
        """Numbers that convolutions keep of a token beside their inputs."""
        return 2 * self.keys

    def kept_bytes(self, tokens: int, dtype_bytes: int = 2, trained: bool = True) -> int:
        """The rows, what convolutions keep, the recurrence's inputs and what its chunks leave for the backward pass,
        its output before and after the gated norm; two gates in fp32."""
        vectors = 3 * self.keys + self.values  # queries, keys, values, and keys as the state is read by them
        chunks = 2 * CHUNK * self.num_heads + self.state_size // CHUNK + self.values
        outputs = (1 + trained) * self.values
        kept = self.row_size + self.convolved_size + vectors + chunks + outputs
        joined = self.shape.hidden_size * (tokens + self.row_size) * dtype_bytes
        return tokens * (dtype_bytes * kept + 12 * self.num_heads) + trained * joined

    @classmethod
    def block_class(cls) -> type[Block]:
        module, _, name = cls.block.partition(":")
        return getattr(import_module(f"{__package__}.{module}"), name)


@dataclass(frozen=True)
class GatedDeltaNetSpec(LinearSpec):
    """G: static causal convolutions on q, k and v; a decay and a write gate per head; an output gate."""

    kind: ClassVar[str] = "G"
    title: ClassVar[str] = "Gated DeltaNet"
    block: ClassVar[str] = "gated_delta_net:GatedDeltaNet"

    @property
    def gate_parameters(self) -> int:
        return self.shape.hidden_size * (self.values + 2 * self.num_heads) + 2 * self.num_heads


@dataclass(frozen=True)
class JetBlockSpec(GatedDeltaNetSpec):
    """J: as G, but with a dynamic causal convolution on v and none on q and k."""

    generator_reduction: int = 8

    kind: ClassVar[str] = "J"
    title: ClassVar[str] = "JetBlock"
    block: ClassVar[str] = "jet_block:JetBlock"

    @property
    def conv_channels(self) -> int:
        return self.values

    @property
    def generator_size(self) -> int:
        """Width of the kernel generator's middle layer."""
        return max(1, self.values // self.generator_reduction)

    @property
    def row_size(self) -> int:
        return 2 * (self.keys + self.values + self.num_heads) + self.generator_size

    @property
    def convolved_size(self) -> int:
        """The kernel of every token and channel, and the layer before it."""
        return self.values * self.conv_size + self.generator_size

    def parameters(self) -> int:
        taps = self.values * self.conv_size
        return super().parameters() + self.generator_size * (self.shape.hidden_size + taps)

    def flops(self, tokens: int, context: int) -> int:
        return super().flops(tokens, context) + 2 * tokens * self.values * self.conv_size


@dataclass(frozen=True)
class DeltaNetSpec(LinearSpec):
    """D: as G, without decay and output gate."""

    kind: ClassVar[str] = "D"
    title: ClassVar[str] = "DeltaNet"
    block: ClassVar[str] = "delta_net:DeltaNet"

    @property
    def gate_parameters(self) -> int:
        return self.shape.hidden_size * self.num_heads


@dataclass(frozen=True)
class KimiDeltaSpec(LinearSpec):
    """K: as G, with a decay per key channel. Decay and output gate come through a middle layer of value_dim."""

    kind: ClassVar[str] = "K"
    title: ClassVar[str] = "Kimi Delta Attention"
    block: ClassVar[str] = "kimi_delta:KimiDelta"

    @property
    def gate_parameters(self) -> int:
        low_rank = self.value_dim * (2 * self.shape.hidden_size + self.keys + self.values) + self.values
        return low_rank + self.num_heads + self.keys + self.shape.hidden_size * self.num_heads


@dataclass(frozen=True)
class GLASpec(LinearSpec):
    """L: a decay per key channel through a narrow middle layer, an output gate; no convolution, no delta rule."""

    kind: ClassVar[str] = "L"
    title: ClassVar[str] = "GLA"
    block: ClassVar[str] = "gla:GatedLinearAttention"
    delta: ClassVar[bool] = False

    @property
    def conv_channels(self) -> int:
        return 0

    @property
    def gate_parameters(self) -> int:
        return self.shape.hidden_size * (self.values + LOW_RANK) + (LOW_RANK + 1) * self.keys


@dataclass(frozen=True)
class RetNetSpec(LinearSpec):
    """T: a fixed decay per head, rotary queries and keys, an output gate; no convolution, no delta rule."""

    kind: ClassVar[str] = "T"
    title: ClassVar[str] = "RetNet"
    block: ClassVar[str] = "retnet:Retention"
    delta: ClassVar[bool] = False

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        spec = super().parse(shape, args)
        if spec.key_dim % 2:
            raise UserError(f"bad arguments {args!r} of layer kind T: rotary queries and keys have an even key_dim")
        return spec

    @property
    def conv_channels(self) -> int:
        return 0

    @property
    def gate_parameters(self) -> int:
        return self.shape.hidden_size * self.values
