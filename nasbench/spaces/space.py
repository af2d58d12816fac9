"""The search space: legal layer-kind names per layer, and how many layers may keep full attention."""

from __future__ import annotations

from dataclasses import dataclass

from nasbench.core.errors import UserError, unknown
from nasbench.spaces.placement import Placement, count_kind, format_placement, kind_of


@dataclass(frozen=True)
class Space:
    """What a search may choose.

    Attributes:
        choices: legal names per layer, e.g. (("A", "W", "J"), ...). The first is the layer's original.
    """

    choices: tuple[tuple[str, ...], ...]

    @classmethod
    def uniform(cls, num_layers: int, names: tuple[str, ...]) -> Space:
        """The same choices in every layer; "A" (the original) is put first and always legal."""
        ordered = ("A", *(name for name in dict.fromkeys(names) if name != "A"))
        return cls((ordered,) * num_layers)

    @property
    def num_layers(self) -> int:
        return len(self.choices)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that is legal somewhere, in order of first appearance."""
        return tuple(dict.fromkeys(name for layer in self.choices for name in layer))

    @property
    def original(self) -> Placement:
        return tuple(layer[0] for layer in self.choices)

    def check(self, placement: Placement) -> Placement:
        """Returns the placement, or raises UserError naming the layer that is not legal."""
        if len(placement) != self.num_layers:
            raise UserError(
                f"placement {format_placement(placement)!r} has {len(placement)} layers, "
                f"the space has {self.num_layers}"
            )
        for layer, (name, legal) in enumerate(zip(placement, self.choices, strict=True)):
            if name not in legal:
                raise unknown(f"layer kind at layer {layer}", name, legal)
        return placement

    def check_full_attention(self, count: int) -> int:
        """Returns K, or raises UserError when it is not in 0..layers."""
        if not 0 <= count <= self.num_layers:
            raise UserError(f"{count} full-attention layers asked of {self.num_layers}: choose 0 to {self.num_layers}")
        return count

    def fillers(self, layer: int) -> tuple[str, ...]:
        """The names of a layer that are not full attention."""
        return tuple(name for name in self.choices[layer] if kind_of(name) != "A")

    def with_full_attention(self, placement: Placement, layers: frozenset[int]) -> Placement:
        """The placement with full attention at `layers` and unchanged elsewhere."""
        return tuple("A" if i in layers else name for i, name in enumerate(placement))


def full_attention_layers(placement: Placement) -> frozenset[int]:
    """Indices of the layers that keep full attention."""
    return frozenset(i for i, name in enumerate(placement) if kind_of(name) == "A")


__all__ = ["Space", "count_kind", "full_attention_layers"]
