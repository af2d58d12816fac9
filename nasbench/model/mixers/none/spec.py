"""N: no mixer at all, so that the layer is its FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.core.errors import UserError
from nasbench.model.spec import LayerShape, MixerSpec

if TYPE_CHECKING:
    from nasbench.model.block import Block


@dataclass(frozen=True)
class NoMixerSpec(MixerSpec):
    """Costs nothing and keeps nothing."""

    kind: ClassVar[str] = "N"
    title: ClassVar[str] = "no mixer"
    starts_trained: ClassVar[bool] = True

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        if args:
            raise UserError(f"bad arguments {args!r} of layer kind N: it takes none")
        return cls(shape)

    @property
    def args(self) -> str:
        return ""

    def parameters(self) -> int:
        return 0

    def flops(self, tokens: int, context: int) -> int:
        return 0

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return 0

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.none.mixer import NoMixer

        return NoMixer
