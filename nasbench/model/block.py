"""A block with weights: one body between its input projections and its output projection.

    row = stream.read(norm, packed, epilogue)     # the stream's own way of computing norm(x) @ weights
    y   = core(row, meta, cache)                  # the block's arithmetic
    stream.write(y, out, post_norm)               # x += y @ out

`core` is plain PyTorch and the truth. `train_core`, `prefill_core` and `decode_core` may be faster forms of it for the
phases that have kernels; by default they are it. A block that does not fit this pattern overrides `run`.

Shapes: B sequences, T tokens, C hidden size, P outputs of all input projections, Y inputs of the output projection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model.meta import Meta, SequenceMeta, StepMeta
from nasbench.model.packed import PackedProjections
from nasbench.model.spec import BlockSpec

if TYPE_CHECKING:
    from nasbench.model.mixers.attention.mixer import FullAttention
    from nasbench.model.stream import Stream

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
UNIT = "weights_unit"
"""The attribute of a module whose weights are gathered around each use (nasbench.parallel.fsdp); no submodule."""


@dataclass(frozen=True)
class Gate:
    """The row is two equal halves: `read` returns activation(first) * second."""

    activation: str = "silu"


@dataclass(frozen=True)
class SiluColumns:
    """The block also needs SiLU of these columns of the row: `decode_core` gets it where the product can write it."""

    begin: int
    size: int


Epilogue = Gate | SiluColumns


class BlockCache:
    """Static, pre-allocated tensors that one block keeps between calls. They are only ever written in place.

    Attributes:
        state: named tensors that `BlockSpec.cache_bytes` counts (keys, values, recurrent state).
        conv_state: named tensors that `BlockSpec.conv_state_bytes` counts (inputs of short convolutions).
        context: most tokens that this cache was allocated for.
    """

    def __init__(self, context: int, state: dict[str, Tensor], conv_state: dict[str, Tensor] | None = None) -> None:
        self.context = context
        self.state = state
        self.conv_state = conv_state or {}

    @property
    def nbytes(self) -> int:
        """Allocated bytes of `state`."""
        return _allocated(self.state)

    @property
    def conv_state_nbytes(self) -> int:
        """Allocated bytes of `conv_state`."""
        return _allocated(self.conv_state)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.state, **self.conv_state}

    def reset(self) -> None:
        """Forgets everything: as freshly allocated."""
        for tensor in self.tensors.values():
            tensor.zero_()

    def fill_random(self, generator: torch.Generator | None = None) -> None:
        """Random non-zero contents of ordinary size, as after many tokens: what a profiler must decode from."""
        for tensor in self.tensors.values():
            tensor.normal_(generator=generator)


def _allocated(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


class Block(nn.Module, ABC):
    """A token mixer or an FFN. Parameter names are those of the published checkpoints.

    Equivalences that the contract tests hold every kind to: the whole sequence at once, chunks of any sizes with a
    cache, and one token at a time give the same outputs; outputs never depend on later tokens; every stream and every
    core give what the reference stream and `core` give.

    Attributes:
        packed: the input projections.
        epilogue: what the stream computes of their row beside the product, None for nothing.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters kept in fp32 whatever the model's dtype."""
    supports_packed_documents: ClassVar[bool] = False
    """Whether `core` heeds `meta.documents`. Other kinds can be trained with `documents = false` only."""
    packed: PackedProjections
    epilogue: Epilogue | None = None

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec

    @property
    @abstractmethod
    def out(self) -> nn.Linear | None:
        """The output projection; None for a block whose `core` has every product in it: normalised input [B, T, C] ->
        what is added [B, T, C]."""

    def new_cache(
        self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> BlockCache | None:
        """An empty cache for `batch` sequences of at most `context` tokens; its bytes equal the specification's
        `cache_bytes` and `conv_state_bytes`. `dtype` is that of keys, values and conv states. None: keeps nothing."""
        return None

    @abstractmethod
    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        """row [B, T, P] -> [B, T, Y] in plain PyTorch; T is 1 with a StepMeta. A block with several input projections
        takes the row apart by `self.packed.split`.

        With a cache, continues after what it holds and writes it in place. Differentiable without a cache. With a
        StepMeta shapes are constant and nothing waits for the device, so that a CUDA graph can capture it.
        """

    def train_core(self, row: Tensor, meta: SequenceMeta) -> Tensor:
        """`core` of a sequence without a cache, differentiable, on a GPU. Rows may be wider than P: zeros follow."""
        return self.core(row[..., : sum(self.packed.sizes)], meta)

    def prefill_core(self, row: Tensor, meta: SequenceMeta, cache: BlockCache | None = None) -> Tensor:
        """`core` of a sequence without gradients on a GPU."""
        return self.core(row, meta, cache)

    def decode_core(self, row: Tensor, meta: StepMeta, cache: BlockCache | None, active: Tensor | None) -> Tensor:
        """`core` of a decode step on a GPU: row [B, P] -> [B, Y].

        Args:
            active: SiLU of the columns that `epilogue` names, [B, size]; None where the block must compute it.
        """
        return self.core(row[:, None], meta, cache)[:, 0]

    def run(
        self,
        stream: Stream,
        norm: nn.Module | None,
        meta: Meta,
        cache: BlockCache | None = None,
        post_norm: nn.Module | None = None,
    ) -> None:
        """Adds the block's output to the stream.

        Args:
            norm: before the block; None where the stream's content is normalised already.
            post_norm: of the block's output before it is added.
        """
        if self.out is None:
            stream.add(self.core(stream.normed(norm), meta, cache), post_norm)
        else:
            stream.write(self.features(stream, norm, meta, cache), self.out, post_norm)

    def features(self, stream: Stream, norm: nn.Module | None, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        """What the output projection reads, [.., Y]."""
        return stream.core(self, stream.read(norm, self.packed, self.epilogue), meta, cache)

    def forward(self, x: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        """Normalised input x [B, T, C] -> the block's output [B, T, C], in the way of the stream that fits the device
        and the phase."""
        return with_weights(self, output_of, x, meta, cache)

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """A mixer of `spec` on the attention's device and dtype that starts from its weights where shapes allow.
        Weights are copies: training the mixer leaves the attention as it is."""
        raise TypeError(f"{cls.__name__} is no token mixer")

    def calibration(self, constant: Tensor) -> dict[str, Tensor]:
        """New values of parameters, by name, once the layer's inputs are known.

        Args:
            constant: [C] fp64, a direction whose product with the layer's normalised inputs is about 1.
        """
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves like any module, except that a change to a half-precision dtype leaves `fp32_parameters` fp32."""
        kept = {name: self.get_parameter(name).detach() for name in self.fp32_parameters}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = self.get_parameter(name)
            if parameter.dtype.itemsize < value.dtype.itemsize:
                parameter.data = value.to(parameter.device)
        return self


def with_weights(module: nn.Module, work: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`work(module, *arguments)`, with the module's weights whole in it and in its backward pass."""
    unit = module.__dict__.get(UNIT)
    return work(module, *arguments) if unit is None else unit(work, *arguments)


def output_of(block: Block, x: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
    """What a block adds to the residual stream, for normalised input x [B, T, C]."""
    from nasbench.model.stream import stream_for

    stream = stream_for(x, meta, residual=False)
    block.run(stream, None, meta, cache)
    return stream.content()


def features_of(block: Block, x: Tensor, meta: Meta) -> Tensor:
    """What a block's output projection reads, [B, T, Y], for normalised input x [B, T, C]."""
    from nasbench.model.stream import stream_for

    stream = stream_for(x, meta, residual=False)
    return block.features(stream, None, meta)


def kinds_without_varlen(blocks: Iterable[Block]) -> list[str]:
    """The kinds that do not support packed documents."""
    return sorted({str(block.spec.kind) for block in blocks if not block.supports_packed_documents})


@dataclass(frozen=True)
class Sublayer:
    """A block in its place: the norms before and after it, where the family has them."""

    norm: nn.Module | None
    block: Block
    post_norm: nn.Module | None = None

    def __call__(self, stream: Stream, meta: Meta, cache: BlockCache | None = None) -> None:
        if UNIT in self.block.__dict__:
            # The unit's hooks want the tensors as arguments and results of one call.
            stream.add(self.block(stream.normed(self.norm), meta, cache), self.post_norm)
        else:
            self.block.run(stream, self.norm, meta, cache, self.post_norm)
