"""What a block is before it has weights: an inert, hashable specification and the costs that follow from it.

A model is a list of blocks, each of which stands between a norm and the residual stream: token mixers and FFNs take
turns. This module imports no torch, so that the cost model and the command line can ask what a block costs without
loading it. A block is a specification here and a module with weights (nasbench.model.block). Third parties register a
specification class under the entry-point group `nasbench.blocks` (a mixer, its letter as the name) or `nasbench.ffns`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from nasbench.core.errors import UserError
from nasbench.core.registry import Registry
from nasbench.core.sizes import is_count
from nasbench.spaces.placement import split_name

if TYPE_CHECKING:
    from nasbench.model.block import Block


STATE_BITS = (32, 16)
"""Of an element of a recurrent state: fp32, as published models were trained, or bf16."""


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding (arXiv 2104.09864): what its tables depend on beside the positions.

    Attributes:
        dim: channels of a head.
        scaling: () for none; else the kind and its numbers, as nasbench.model.rotary lists them.
        rotated: channels that are rotated, 0 for all. The first half of them stands at the head's beginning, the second
            half at its middle.
    """

    dim: int
    theta: float
    scaling: tuple[str | float, ...] = ()
    rotated: int = 0

    @property
    def varies(self) -> bool:
        """Whether frequencies depend on the length of the text."""
        return self.scaling[:1] in (("dynamic",), ("longrope",))


@dataclass(frozen=True)
class LayerShape:
    """The attention that a layer was pre-trained with; every alternative is derived from it."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rms_eps: float = 1e-6
    rope_scaling: tuple[str | float, ...] = ()
    rotary_dim: int = 0
    wide_qk_norm: bool = False

    @property
    def rotary(self) -> Rotary:
        return Rotary(self.head_dim, self.rope_theta, self.rope_scaling, self.rotary_dim)

    @property
    def variant(self) -> str:
        """Details of the attention that cost time, as "bias+qknorm"; "" for none."""
        norm = "qknorm-wide" if self.wide_qk_norm else "qknorm" if self.qk_norm else ""
        return "+".join(name for name in ("bias" if self.qkv_bias else "", norm) if name)


class BlockSpec(ABC):
    """One block with its hyper-parameters. Everything here is a pure function.

    Byte counts take `dtype_bytes`, the size of weights, activations, keys and values; recurrent states are fp32.
    """

    kind: ClassVar[str]
    """A mixer's letter in placements; an FFN's word."""
    title: ClassVar[str]
    """The name in reports, e.g. "sliding window"."""
    recurrent: ClassVar[bool] = False
    """Whether decoding rewrites the whole cache at every step."""

    @property
    @abstractmethod
    def hidden(self) -> int:
        """Hidden size of the layer."""

    @property
    @abstractmethod
    def args(self) -> str:
        """Canonical arguments, complete: `1152`, `12x96x256`, or "" for a kind without any."""

    @abstractmethod
    def parameters(self) -> int:
        """Number of parameters of the block, its norms left out."""

    @abstractmethod
    def flops(self, tokens: int, context: int) -> int:
        """Floating-point operations of a chunk of `tokens` new tokens of one sequence after `context` earlier ones."""

    @abstractmethod
    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        """Bytes of keys, values and recurrent state that decoding `batch` sequences of `context` tokens holds.

        This is the "cache size" of arXiv 2508.15884 table 1. `conv_state_bytes` counts the last inputs of short
        convolutions.
        """

    def conv_state_bytes(self, batch: int, dtype_bytes: int = 2) -> int:
        """Bytes of the last few inputs that short convolutions keep for decoding."""
        return 0

    def weight_bytes(self, tokens: int, dtype_bytes: int = 2) -> int:
        """Bytes of the weights that `tokens` tokens together read, each once."""
        return self.parameters() * dtype_bytes

    def product_parameters(self) -> int:
        """Parameters that each token is multiplied with: all, unless a router chooses some."""
        return self.parameters()

    def traffic_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        """Bytes of cache that one decode step reads and writes. Default: the whole cache is read once."""
        return self.cache_bytes(batch, context, dtype_bytes)

    def kept_bytes(self, tokens: int, dtype_bytes: int = 2, trained: bool = True) -> int:
        """Bytes that a training step keeps of the block from its forward to its backward pass, by a GPU's kernels, its
        norm and the residual stream left out.

        Args:
            trained: its weights have gradients, and so keep their inputs; else only what stands before it learns.

        Default, an estimate: every product's output twice.
        """
        outputs = 2 * self.product_parameters() // self.hidden
        return tokens * dtype_bytes * (self.hidden * trained + outputs)

    def decode_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        """Least bytes that one decode step moves: the weights once, the cache as it is read and written."""
        return self.weight_bytes(batch, dtype_bytes) + self.traffic_bytes(batch, context, dtype_bytes)

    @classmethod
    @abstractmethod
    def block_class(cls) -> type[Block]:
        """The torch module of this kind, imported only here."""

    def build(self) -> Block:
        """A freshly initialised block of this specification."""
        return self.block_class()(self)


class Dims(NamedTuple):
    """Dimensions of a recurrent state, and the tokens that its short convolutions see: what PostNAS stage 4 chooses."""

    heads: int
    key_dim: int
    value_dim: int
    conv_size: int


@dataclass(frozen=True)
class MixerSpec(BlockSpec):
    """A token mixer: what stands in the place of a layer's attention."""

    shape: LayerShape

    @property
    def hidden(self) -> int:
        return self.shape.hidden_size

    is_attention: ClassVar[bool] = False
    """Whether other kinds can start from its weights."""
    starts_trained: ClassVar[bool] = False
    """Whether the attention's own weights serve unchanged, so that a supernet need not train them."""

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding that a layer of this kind looks up, if any: a decoder makes its tables beforehand."""
        return self.shape.rotary

    @property
    def dims(self) -> Dims | None:
        """What `resized` takes; None for a kind that has no such dimensions."""
        return None

    def resized(self, dims: Dims) -> Self:
        """The kind with other dimensions. Raises UserError for those that it cannot have, or where it has none."""
        raise UserError(f"kind {self.kind} has no heads, key, value and convolution sizes to choose")

    @property
    def exact_until(self) -> float:
        """Tokens of the longest text on which the mixer with the attention's weights is full attention: infinite for
        that itself, 0 for a kind that differs from the first token on or has weights of its own."""
        return 0

    @classmethod
    @abstractmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        """From the text behind the letter, `""` for the kind's default for this shape. Raises UserError."""


@dataclass(frozen=True)
class FFNSpec(BlockSpec):
    """A feed-forward block, which looks at one token at a time, or at the one before, too."""

    hidden_size: int

    @property
    def hidden(self) -> int:
        return self.hidden_size

    @classmethod
    @abstractmethod
    def parse(cls, hidden_size: int, intermediate_size: int, activation: str, args: str) -> Self:
        """From the text behind `kind@`, "" for the model's own sizes. Raises UserError."""

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return 0

    def flops(self, tokens: int, context: int) -> int:
        return 2 * tokens * self.product_parameters()


MIXERS: Registry[type[MixerSpec]] = Registry("layer kind", group="nasbench.blocks")
FFNS: Registry[type[FFNSpec]] = Registry("FFN kind", group="nasbench.ffns")


def mixer_spec(name: str, shape: LayerShape, defaults: tuple[tuple[str, str], ...] = ()) -> MixerSpec:
    """The specification of a placement's layer name (`A`, `W1152`, `J@12x96x256`).

    Args:
        defaults: (letter, arguments) that a model gives to names without arguments.

    Raises:
        UserError: unknown letter, or arguments that the kind does not take.
    """
    letter, args = split_name(name)
    return MIXERS[letter].parse(shape, args or dict(defaults).get(letter, ""))


def ffn_spec(text: str, hidden_size: int, intermediate_size: int, activation: str) -> FFNSpec:
    """The specification of an FFN by its text: `gated`, `moe@128x8x768+2`, `none`. Raises UserError."""
    kind, _, args = text.partition("@")
    return FFNS[kind].parse(hidden_size, intermediate_size, activation, args)


def parse_ints(kind: str, args: str, names: tuple[str, ...]) -> tuple[int, ...]:
    """`"12x96x256"` -> (12, 96, 256), one positive number per name. Raises UserError naming what is expected."""
    parts = args.split("x")
    if len(parts) != len(names) or not all(is_count(part) and int(part) > 0 for part in parts):
        raise UserError(f"bad arguments {args!r} of layer kind {kind}: write {'x'.join(names)}, positive whole numbers")
    return tuple(int(part) for part in parts)


def check_state_bits(kind: str, args: str, bits: int = STATE_BITS[0]) -> int:
    """`bits`, if a recurrent state may have so many. Raises UserError."""
    if bits not in STATE_BITS:
        raise UserError(f"bad arguments {args!r} of layer kind {kind}: the state has 32 bits (fp32) or 16 (bf16)")
    return bits
