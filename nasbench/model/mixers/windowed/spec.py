"""H: a short sliding window and a JetBlock in one layer, both reading its input, one output projection over both.

A state of fixed size blurs what the nearest tokens say and where they stand; a window of a few dozen keys holds just
that exactly, with the attention's own weights, and forgets all else. Side by side each does what the other cannot:
Hymba (arXiv 2411.13676) pairs attention and state-space heads so, LoLCATs (arXiv 2410.10254) and Lizard
(arXiv 2507.09025) linear attention with a window when they convert a trained model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.model.mixers.gated_delta.spec import JetBlockSpec
from nasbench.model.mixers.sliding_window.spec import SlidingWindowSpec
from nasbench.model.spec import Dims, LayerShape, MixerSpec

if TYPE_CHECKING:
    from nasbench.model.block import Block

DEFAULT_WINDOW = 64


@dataclass(frozen=True)
class WindowedJetBlockSpec(MixerSpec):
    """Arguments: `window`, or `window x heads x key_dim x value_dim` of the JetBlock. Every cost is the sum of both."""

    near: SlidingWindowSpec
    far: JetBlockSpec

    kind: ClassVar[str] = "H"
    title: ClassVar[str] = "window + JetBlock"
    recurrent: ClassVar[bool] = True

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        window, _, far = args.partition("x")
        near = SlidingWindowSpec.parse(shape, window or str(DEFAULT_WINDOW))
        return cls(shape, near, JetBlockSpec.parse(shape, far))

    @property
    def args(self) -> str:
        return f"{self.near.args}x{self.far.args}"

    @property
    def dims(self) -> Dims:
        return self.far.dims

    def resized(self, dims: Dims) -> Self:
        """The window stays."""
        return replace(self, far=self.far.resized(dims))

    def parameters(self) -> int:
        return self.near.parameters() + self.far.parameters()

    def flops(self, tokens: int, context: int) -> int:
        return self.near.flops(tokens, context) + self.far.flops(tokens, context)

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return sum(part.cache_bytes(batch, context, dtype_bytes) for part in (self.near, self.far))

    def conv_state_bytes(self, batch: int, dtype_bytes: int = 2) -> int:
        return self.far.conv_state_bytes(batch, dtype_bytes)

    def traffic_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return sum(part.traffic_bytes(batch, context, dtype_bytes) for part in (self.near, self.far))

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.windowed.mixer import WindowedJetBlock

        return WindowedJetBlock
