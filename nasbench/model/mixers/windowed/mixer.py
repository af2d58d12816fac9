"""H with weights: a sliding window and a JetBlock beside it. Each keeps its own projections, cache and cores."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nasbench.model.block import Block, BlockCache
from nasbench.model.meta import Meta
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.jet_block import JetBlock
from nasbench.model.mixers.sliding_window.mixer import SlidingWindow
from nasbench.model.mixers.windowed.spec import WindowedJetBlockSpec
from nasbench.model.packed import PackedProjections
from nasbench.model.stream import Stream


class WindowedJetBlock(Block):
    """out(window(x) beside jet_block(x)). The parts read the input by products of their own, since only the window's
    may have a bias."""

    spec: WindowedJetBlockSpec
    supports_packed_documents: ClassVar[bool] = True
    fp32_parameters: ClassVar[tuple[str, ...]] = tuple(f"far.{name}" for name in JetBlock.fp32_parameters)

    def __init__(self, spec: WindowedJetBlockSpec) -> None:
        super().__init__(spec)
        self.near, self.far = SlidingWindow(spec.near), JetBlock(spec.far)
        features = self.near.o_proj.in_features + self.far.o_proj.in_features
        self.o_proj = nn.Linear(features, spec.shape.hidden_size, bias=False)
        self.packed = PackedProjections(())
        del self.near.o_proj, self.far.o_proj

    @property
    def out(self) -> nn.Linear:
        return self.o_proj

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        near = self.near.new_cache(batch, context, device=device, dtype=dtype)
        far = self.far.new_cache(batch, context, device=device, dtype=dtype)
        return BlockCache(context, {**near.state, **far.state}, far.conv_state)

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        """Normalised input [B, T, C] -> features of both, [B, T, Y]."""
        return torch.cat([part.core(part.packed(row), meta, kept) for part, kept in self._parts(cache)], -1)

    def features(self, stream: Stream, norm: nn.Module | None, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        return torch.cat([part.features(stream, norm, meta, kept) for part, kept in self._parts(cache)], -1)

    def _parts(self, cache: BlockCache | None) -> tuple[tuple[Block, BlockCache | None], ...]:
        if cache is None:
            return (self.near, None), (self.far, None)
        rings = {name: cache.state[name] for name in ("keys", "values")}
        far = BlockCache(cache.context, {"state": cache.state["state"]}, cache.conv_state)
        return (self.near, BlockCache(cache.context, rings)), (self.far, far)

    def calibration(self, constant: Tensor) -> dict[str, Tensor]:
        return {f"far.{name}": value for name, value in self.far.calibration(constant).items()}

    @classmethod
    def init_from_attention(cls, spec: Any, attention: FullAttention) -> Self:
        """Both parts start from the attention's weights. The output projection starts as the window's alone."""
        near = SlidingWindow.init_from_attention(spec.near, attention)
        far = JetBlock.init_from_attention(spec.far, attention)
        weight = attention.o_proj.weight
        mixer = cls(spec).to(device=weight.device, dtype=weight.dtype)
        mixer.o_proj.weight.data = torch.cat((near.o_proj.weight.detach(), torch.zeros_like(far.o_proj.weight)), 1)
        del near.o_proj, far.o_proj
        mixer.near.load_state_dict(near.state_dict())
        mixer.far.load_state_dict(far.state_dict())
        return mixer
