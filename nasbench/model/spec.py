"""What a layer kind is before it has weights: a frozen configuration and the costs that follow from it.

Imports no torch, so that the cost model and the command line can ask a kind what it costs without loading it.
A kind is two files: `<kind>.py` with its `MixerSpec` (this contract) and `<kind>_mixer.py` with its
`TokenMixer` (nasbench.model.block). Third parties register the configuration class under the entry-point group
`nasbench.blocks`, its letter as the name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.core.errors import UserError
from nasbench.core.registry import Registry
from nasbench.spaces.placement import args_of, kind_of

if TYPE_CHECKING:
    from nasbench.model.block import TokenMixer


@dataclass(frozen=True)
class LayerShape:
    """The full attention that a layer was pre-trained with; every alternative is derived from it.

    `rope_scaling` is () for none or ("llama3", factor, low_freq_factor, high_freq_factor, original_max_context).
    """

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

    @property
    def variant(self) -> str:
        """Details of the attention that cost time: "bias", "qknorm", "bias+qknorm" or ""."""
        return "+".join(name for name, on in (("bias", self.qkv_bias), ("qknorm", self.qk_norm)) if on)


@dataclass(frozen=True)
class MixerSpec(ABC):
    """One layer kind with its hyper-parameters, for a given layer shape. Everything here is a pure function.

    Byte counts take `dtype_bytes`, the size of weights, activations and keys/values; recurrent states are fp32.
    """

    shape: LayerShape

    kind: ClassVar[str]
    """The letter in placements."""
    title: ClassVar[str]
    """The name in reports, e.g. "sliding window"."""

    @classmethod
    @abstractmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        """From the text behind the letter, `""` for the kind's default for this shape. Raises UserError."""

    @property
    @abstractmethod
    def args(self) -> str:
        """Canonical arguments, complete: `1152`, `12x96x256`, or "" for a kind without any."""

    @abstractmethod
    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        """Bytes of keys, values and recurrent state that decoding `batch` sequences of `context` tokens holds.

        This is the "cache size" of arXiv 2508.15884 table 1. The last inputs of short convolutions are counted
        apart, in `history_bytes`.
        """

    def history_bytes(self, batch: int, dtype_bytes: int = 2) -> int:
        """Bytes of the last few inputs that short convolutions keep for decoding."""
        return 0

    @abstractmethod
    def parameters(self) -> int:
        """Number of parameters of the mixer."""

    @abstractmethod
    def flops(self, tokens: int, context: int) -> int:
        """Floating-point operations of a chunk of `tokens` new tokens of one sequence after `context` earlier ones."""

    def state_traffic_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        """Bytes of cache that one decode step reads and writes. Default: the whole cache is read once."""
        return self.cache_bytes(batch, context, dtype_bytes)

    def decode_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        """Least bytes that one decode step moves: the weights once, the cache as it is read and written."""
        return self.parameters() * dtype_bytes + self.state_traffic_bytes(batch, context, dtype_bytes)

    @classmethod
    @abstractmethod
    def mixer_class(cls) -> type[TokenMixer]:
        """The torch module of this kind, imported only here."""

    def build(self) -> TokenMixer:
        """A freshly initialised mixer of this configuration."""
        return self.mixer_class()(self)


MIXERS: Registry[type[MixerSpec]] = Registry("layer kind", group="nasbench.blocks")


def mixer_spec(name: str, shape: LayerShape, defaults: tuple[tuple[str, str], ...] = ()) -> MixerSpec:
    """The configuration of a placement's layer name (`A`, `W1152`, `J@12x96x256`).

    Args:
        defaults: (letter, arguments) that a model gives to names without arguments.

    Raises:
        UserError: unknown letter, or arguments that the kind does not take.
    """
    kind = MIXERS[kind_of(name)]
    return kind.parse(shape, args_of(name) or dict(defaults).get(kind_of(name), ""))


def parse_ints(kind: str, args: str, names: tuple[str, ...]) -> tuple[int, ...]:
    """`"12x96x256"` -> (12, 96, 256), one positive number per name. Raises UserError naming what is expected."""
    parts = args.split("x")
    if len(parts) != len(names) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"bad arguments {args!r} of layer kind {kind}: write {'x'.join(names)}, positive whole numbers")
    return tuple(int(part) for part in parts)
