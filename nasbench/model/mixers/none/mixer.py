"""N with weights, of which it has none."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nasbench.model.block import Block, BlockCache
from nasbench.model.meta import Meta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.packed import PackedProjections
from nasbench.model.spec import MixerSpec
from nasbench.model.stream import Stream


class NoMixer(Block):
    """Adds nothing to the stream."""

    supports_packed_documents: ClassVar[bool] = True

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        self.packed = PackedProjections(())

    @property
    def out(self) -> None:
        return None

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        return BlockCache(context, {})

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        return torch.zeros_like(row)

    def run(self, stream: Stream, *arguments: Any, **further: Any) -> None:
        if not stream.residual:
            stream.add(torch.zeros_like(stream.x))

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        return cls(spec)
