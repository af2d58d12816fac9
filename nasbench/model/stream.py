"""The residual stream: how the products, norms and additions next to it are computed in each phase.

| stream | read | write |
|---|---|---|
| reference (any device, the truth) | linear(norm(x)) | x + out(y) |
| training | one product for all projections of an input, so that its gradient is one product too | x + out(y) |
| prompt | addition and norm in one kernel, library product, SwiGLU in one kernel | leaves out(y) for the next read |
| decode, many sequences | as prompt; each weight read once, by our product or the library's | leaves parts of out(y) |
| decode, one sequence | norm inside the matrix-vector kernel | the matrix-vector kernel adds to x |

One loop runs a model in every phase:

    for sublayer, cache in zip(decoder.sublayers, caches): sublayer(stream, meta, cache)

Shapes: B sequences, T tokens, C hidden size, P outputs of all input projections, Y inputs of the output projection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import ACTIVATIONS, Block, BlockCache, Epilogue, Gate
from nasbench.model.meta import Meta, SequenceMeta, StepMeta
from nasbench.model.packed import PackedProjections


def _gated(row: Tensor, gate: Gate) -> Tensor:
    first, second = row.chunk(2, dim=-1)
    return ACTIVATIONS[gate.activation](first) * second


class Stream(ABC):
    """The residual stream of one forward pass or decode step.

    Args:
        x: [B, T, C]; embeddings at first.
        residual: False where a block's output is wanted and not its sum with x: `content` is what was added last.
    """

    fuses_norm: ClassVar[bool] = False
    """Whether norms and additions are parts of the products next to them."""

    def __init__(self, x: Tensor, residual: bool = True) -> None:
        self.x, self.residual = x, residual

    @abstractmethod
    def normed(self, norm: nn.Module | None) -> Tensor:
        """norm(x), [B, T, C]; x itself without a norm."""

    @abstractmethod
    def read(self, norm: nn.Module | None, packed: PackedProjections, epilogue: Epilogue | None = None) -> Tensor:
        """norm(x) @ the packed projections: [.., P], [.., P / 2] behind a Gate."""

    @abstractmethod
    def core(self, block: Block, row: Tensor, meta: Meta, cache: BlockCache | None) -> Tensor:
        """The block's own arithmetic by the form that is made for this phase: [.., P] -> [.., Y]."""

    def write(self, y: Tensor, out: nn.Linear, post_norm: nn.Module | None = None) -> None:
        """x += post_norm(y @ out)."""
        self.add(out(y), post_norm)

    @abstractmethod
    def add(self, delta: Tensor, post_norm: nn.Module | None = None) -> None:
        """x += post_norm(delta), delta [B, T, C]."""

    @abstractmethod
    def content(self) -> Tensor:
        """x as it stands, [B, T, C]."""

    def logits(self, norm: nn.Module | None, weight: Tensor) -> Tensor:
        """norm(x) @ the output matrix [V, C]: [B, T, V]."""
        return F.linear(self.normed(norm), weight)


class ReferenceStream(Stream):
    """Plain PyTorch on any device."""

    def normed(self, norm: nn.Module | None) -> Tensor:
        return self.x if norm is None else norm(self.x)

    def read(self, norm: nn.Module | None, packed: PackedProjections, epilogue: Epilogue | None = None) -> Tensor:
        hidden = self.normed(norm)
        if isinstance(epilogue, Gate):
            first, second = packed.parts(hidden)
            return ACTIVATIONS[epilogue.activation](first) * second
        return packed(hidden)

    def core(self, block: Block, row: Tensor, meta: Meta, cache: BlockCache | None) -> Tensor:
        return block.core(row, meta, cache)

    def add(self, delta: Tensor, post_norm: nn.Module | None = None) -> None:
        delta = delta if post_norm is None else post_norm(delta)
        self.x = self.x + delta if self.residual else delta

    def content(self) -> Tensor:
        return self.x


class TrainStream(ReferenceStream):
    """Gradients on a GPU: few launches, nothing in memory twice, x never written in place."""

    def read(self, norm: nn.Module | None, packed: PackedProjections, epilogue: Epilogue | None = None) -> Tensor:
        row = packed.aligned(self.normed(norm))
        if not isinstance(epilogue, Gate):
            return row
        row = row[..., : sum(packed.sizes)]
        return fused.ops().swiglu(row) if epilogue.activation == "silu" else _gated(row, epilogue)

    def core(self, block: Block, row: Tensor, meta: Meta, cache: BlockCache | None) -> Tensor:
        assert isinstance(meta, SequenceMeta)
        return block.train_core(row, meta) if cache is None else block.core(row, meta, cache)


class _InPlaceStream(Stream):
    """Inference on a GPU: x is written in place. What a block leaves is added by the kernel of the next norm."""

    pending: Tensor | None = None

    def normed(self, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return self.content()
        assert isinstance(norm, nn.RMSNorm)
        pending, self.pending = self.pending, None
        return fused.ops().add_norm(self.x, pending, norm.weight, norm.eps)

    def add(self, delta: Tensor, post_norm: nn.Module | None = None) -> None:
        delta = delta if post_norm is None else post_norm(delta)
        if not self.residual:
            self.x = delta
        else:
            self.content()
            self.pending = delta.contiguous()

    def content(self) -> Tensor:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            # Parts of a product that was split over its columns have one dimension more.
            self.x += pending if pending.ndim == self.x.ndim else pending.sum(0)
        return self.x


class PromptStream(_InPlaceStream):
    """Chunks of prompts and scored text."""

    def read(self, norm: nn.Module | None, packed: PackedProjections, epilogue: Epilogue | None = None) -> Tensor:
        row = F.linear(self.normed(norm), *packed.weight_and_bias())
        if not isinstance(epilogue, Gate):
            return row
        return fused.ops().swiglu(row) if epilogue.activation == "silu" else _gated(row, epilogue)

    def core(self, block: Block, row: Tensor, meta: Meta, cache: BlockCache | None) -> Tensor:
        assert isinstance(meta, SequenceMeta)
        return block.prefill_core(row, meta, cache)


class _DecodeStream(_InPlaceStream):
    """One new token of every sequence; inside, x is [B, C]."""

    active: Tensor | None = None

    def __init__(self, x: Tensor, residual: bool = True) -> None:
        super().__init__(x[:, 0], residual)

    def core(self, block: Block, row: Tensor, meta: Meta, cache: BlockCache | None) -> Tensor:
        assert isinstance(meta, StepMeta)
        return block.decode_core(row, meta, cache, self.active)

    def content(self) -> Tensor:
        return super().content()[:, None]

    def add(self, delta: Tensor, post_norm: nn.Module | None = None) -> None:
        super().add(delta[:, 0] if delta.ndim == 3 else delta, post_norm)

    def normed(self, norm: nn.Module | None) -> Tensor:
        return self.rows(norm)[:, None]

    def rows(self, norm: nn.Module | None) -> Tensor:
        """norm(x), [B, C]."""
        return super().content() if norm is None else super().normed(norm)


class DecodeManyStream(_DecodeStream):
    """Decode of more than one sequence: products whose weights are read once for all of them."""

    def read(self, norm: nn.Module | None, packed: PackedProjections, epilogue: Epilogue | None = None) -> Tensor:
        hidden, (weight, bias), self.active = self.rows(norm), packed.weight_and_bias(), None
        if isinstance(epilogue, Gate):
            if epilogue.activation == "silu" and bias is None:
                return fused.swiglu_linear(hidden, weight)
            return _gated(fused.linear(hidden, weight, bias), epilogue)
        if epilogue is not None and fused.ops().prefer_skinny_gemm(hidden, weight):
            row, self.active = fused.ops().gemm_and_silu(hidden, weight, bias, epilogue.begin, epilogue.size)
            return row
        return fused.linear(hidden, weight, bias)

    def write(self, y: Tensor, out: nn.Linear, post_norm: nn.Module | None = None) -> None:
        if post_norm is None and out.bias is None and self.residual:
            super().content()
            self.pending = fused.partial_sums(y, out.weight)
        else:
            self.add(fused.linear(y, out.weight, out.bias), post_norm)

    def logits(self, norm: nn.Module | None, weight: Tensor) -> Tensor:
        return fused.linear(self.rows(norm), weight)[:, None]


class DecodeOneStream(_DecodeStream):
    """Decode of one sequence: matrix-vector kernels that hold the norm before them and the addition after them."""

    fuses_norm = True

    def _product(
        self, norm: nn.Module | None, weight: Tensor, bias: Tensor | None = None, swiglu: bool = False
    ) -> Tensor:
        x = super().content()[:, 0]
        if norm is None:
            return fused.ops().gemv(x, weight, bias, swiglu=swiglu)
        assert isinstance(norm, nn.RMSNorm)
        return fused.ops().gemv(x, weight, bias, before="norm", norm_weight=norm.weight, eps=norm.eps, swiglu=swiglu)

    def read(self, norm: nn.Module | None, packed: PackedProjections, epilogue: Epilogue | None = None) -> Tensor:
        weight, bias = packed.weight_and_bias()
        if not isinstance(epilogue, Gate):
            return self._product(norm, weight, bias)
        if epilogue.activation == "silu" and bias is None:
            return self._product(norm, weight, swiglu=True)
        return _gated(self._product(norm, weight, bias), epilogue)

    def write(self, y: Tensor, out: nn.Linear, post_norm: nn.Module | None = None) -> None:
        if post_norm is None and out.bias is None and self.residual:
            fused.ops().gemv(y, out.weight, add_to=self.x)
        else:
            self.add(fused.ops().gemv(y, out.weight, out.bias), post_norm)

    def logits(self, norm: nn.Module | None, weight: Tensor) -> Tensor:
        return self._product(norm, weight)[:, None]


def stream_for(x: Tensor, meta: Meta, residual: bool = True, in_place: bool = True) -> Stream:
    """The stream that fits the device of x [B, T, C], the phase, and whether gradients are wanted.

    Args:
        residual: see Stream.
        in_place: whether x may be written over.
    """
    if not fused.autograd_kernels(x):
        return ReferenceStream(x, residual)
    if isinstance(meta, StepMeta):
        if not in_place or torch.is_grad_enabled():
            return ReferenceStream(x, residual)
        return DecodeOneStream(x, residual) if len(x) == 1 else DecodeManyStream(x, residual)
    if torch.is_grad_enabled() or not in_place:
        return TrainStream(x, residual)
    return PromptStream(x, residual)
