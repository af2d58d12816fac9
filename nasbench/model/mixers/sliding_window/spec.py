"""W: sliding-window attention. A window of w means w keys, the current token included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.model.mixers.attention.spec import (
    attention_flops,
    attention_kept_bytes,
    attention_parameters,
    key_value_bytes,
)
from nasbench.model.spec import LayerShape, MixerSpec, parse_ints

if TYPE_CHECKING:
    from nasbench.model.block import Block

DEFAULT_WINDOW = 1152
"""The window of the released Jet-Nemotron-2B."""


@dataclass(frozen=True)
class SlidingWindowSpec(MixerSpec):
    """Attention over the last `window` keys, kept in a ring buffer."""

    window: int = DEFAULT_WINDOW

    kind: ClassVar[str] = "W"
    title: ClassVar[str] = "sliding window"
    is_attention: ClassVar[bool] = True
    starts_trained: ClassVar[bool] = True

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        return cls(shape, *parse_ints("W", args or str(DEFAULT_WINDOW), ("window",)))

    @property
    def args(self) -> str:
        return str(self.window)

    @property
    def exact_until(self) -> float:
        return self.window

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return key_value_bytes(self.shape, batch, min(self.window, context), dtype_bytes)

    def parameters(self) -> int:
        return attention_parameters(self.shape)

    def flops(self, tokens: int, context: int) -> int:
        growing = max(0, min(tokens, self.window - context))
        scored = growing * context + growing * (growing + 1) // 2 + (tokens - growing) * self.window
        return attention_flops(self.shape, tokens, scored)

    def kept_bytes(self, tokens: int, dtype_bytes: int = 2, trained: bool = True) -> int:
        return attention_kept_bytes(self.shape, tokens, dtype_bytes, trained)

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.sliding_window.mixer import SlidingWindow

        return SlidingWindow
