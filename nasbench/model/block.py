"""The contract of a layer kind with weights: forward over a chunk, one decode step, a static cache.

Shapes: B sequences, T tokens, C hidden size, H heads, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from nasbench.model.documents import Documents
from nasbench.model.spec import MixerSpec

if TYPE_CHECKING:
    from nasbench.model.mixers.attention.mixer import FullAttention


@dataclass(frozen=True)
class Chunk:
    """Where the T tokens of a forward stand. All sequences of the batch stand at the same place.

    Attributes:
        start: tokens that the cache already holds; 0 without a cache.
        cos, sin: rotary tables of the chunk's positions, [T, D] fp32 (halves repeated, as rotate-half wants them).
        documents: where documents begin in packed rows, for training and scoring without a cache; None where each row
            is one text. Positions count on through a row: only their differences matter to rotary embeddings.
    """

    start: int
    cos: Tensor
    sin: Tensor
    documents: Documents | None = None


@dataclass(frozen=True)
class Step:
    """Where the one new token of every sequence of a decode step stands. Reading it costs no host synchronisation.

    Attributes:
        positions: [B] int64 on the device, 0-based position of the new token of each sequence.
        span: host-side bound: no sequence looks at more than `span` keys, the new one included.
        uniform: every position is span - 1, so that no mask over the keys is needed.
        cos, sin: rotary tables at `positions`, [B, 1, D] fp32.
    """

    positions: Tensor
    span: int
    uniform: bool
    cos: Tensor
    sin: Tensor


class MixerCache:
    """Static, pre-allocated tensors that one mixer keeps between calls. They are only ever written in place.

    Attributes:
        state: named tensors that `MixerSpec.cache_bytes` counts (keys, values, recurrent state).
        history: named tensors that `MixerSpec.history_bytes` counts (inputs of short convolutions).
        context: most tokens that this cache was allocated for.
    """

    def __init__(self, context: int, state: dict[str, Tensor], history: dict[str, Tensor] | None = None) -> None:
        self.context = context
        self.state = state
        self.history = history or {}

    @property
    def nbytes(self) -> int:
        """Allocated bytes of `state`."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.state.values())

    @property
    def history_nbytes(self) -> int:
        """Allocated bytes of `history`."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.history.values())

    def reset(self) -> None:
        """Forgets everything: as freshly allocated."""
        for tensor in (*self.state.values(), *self.history.values()):
            tensor.zero_()

    def fill_random(self, generator: torch.Generator | None = None) -> None:
        """Random non-zero contents of ordinary size, as after many tokens: what a profiler must decode from."""
        for tensor in (*self.state.values(), *self.history.values()):
            tensor.normal_(generator=generator)


class TokenMixer(nn.Module, ABC):
    """What stands in a layer's place of attention. Parameter names are those of the published checkpoints.

    Equivalences that the contract tests hold every kind to: `forward` over a whole sequence, `forward` in chunks of
    any sizes with a cache, and `step` token by token give the same outputs; outputs never depend on later tokens.
    """

    config_class: ClassVar[type[MixerSpec]]
    keeps_documents_apart: ClassVar[bool] = False
    """Whether `forward` heeds `Chunk.documents`. Kinds that do not can be trained with `documents = false` only."""

    def __init__(self, config: MixerSpec) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> MixerCache:
        """An empty cache for `batch` sequences of at most `context` tokens; its bytes equal the configuration's
        `cache_bytes` and `history_bytes`. `dtype` is that of keys, values and histories."""

    @abstractmethod
    def forward(self, x: Tensor, chunk: Chunk, cache: MixerCache | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]. With a cache, continues after its `chunk.start` tokens and writes it in place.
        T >= 1 is any size. Differentiable without a cache."""

    @abstractmethod
    def step(self, x: Tensor, step: Step, cache: MixerCache) -> Tensor:
        """x [B, 1, C] -> [B, 1, C], writing the cache in place. Constant shapes and no host synchronisation, so that
        it can be captured in a CUDA graph."""

    @classmethod
    @abstractmethod
    def init_from_attention(cls, config: MixerSpec, attention: FullAttention) -> Self:
        """A mixer of `config` on the attention's device and dtype that starts from its weights where shapes allow.
        Weights are copies: training the mixer leaves the attention as it is."""
