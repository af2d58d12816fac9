"""The search space: which layer kinds each layer may have, and which of them is full attention."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from nasbench.core.errors import UserError, unknown
from nasbench.spaces.placement import Placement, format_placement, is_of

FULL = "A"
"""Full attention; K of a placement counts the layers that have it."""


def is_full(name: str) -> bool:
    """Whether a layer name is full attention."""
    return is_of(name, FULL)


def full_layers(placement: Placement) -> frozenset[int]:
    """Indices of the layers with full attention."""
    return frozenset(i for i, name in enumerate(placement) if is_full(name))


def count_full(placement: Placement) -> int:
    """K: layers with full attention."""
    return len(full_layers(placement))


def original_of(placement: Placement) -> str:
    """A model's own placement as a run keeps it: "" where every layer is full attention."""
    return "" if all(name == FULL for name in placement) else format_placement(placement)


@dataclass(frozen=True)
class Space:
    """What a search may choose.

    Attributes:
        choices: legal names per layer, e.g. (("A", "W", "J"), ...). The first is the layer's original: full attention,
            or another kind in models that have several, such as Gemma's windows.
    """

    choices: tuple[tuple[str, ...], ...]

    @classmethod
    def uniform(cls, num_layers: int, names: tuple[str, ...]) -> Space:
        """The same choices in every layer; full attention is each layer's original."""
        return cls.around((FULL,) * num_layers, names)

    @classmethod
    def around(cls, original: Placement, names: tuple[str, ...]) -> Space:
        """The original of every layer, or one of the names; full attention only where it is the original."""
        return cls(tuple((own, *(n for n in dict.fromkeys(names) if n not in (own, FULL))) for own in original))

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

    @cached_property
    def may_be_full(self) -> tuple[int, ...]:
        """The layers that may have full attention."""
        return tuple(i for i, names in enumerate(self.choices) if FULL in names)

    def check(self, placement: Placement) -> Placement:
        """Returns the placement, or raises UserError naming the layer that is not legal. A letter without arguments
        stands for the layer's only kind of that letter: W for W256."""
        if len(placement) != self.num_layers:
            raise UserError(
                f"placement {format_placement(placement)!r} has {len(placement)} layers, "
                f"the space has {self.num_layers}"
            )
        found = list(placement)
        for layer, (name, legal) in enumerate(zip(placement, self.choices, strict=True)):
            if name not in legal:
                meant = [kind for kind in legal if len(name) == 1 and is_of(kind, name)]
                if len(meant) != 1:
                    raise unknown(f"layer kind at layer {layer}", name, legal)
                found[layer] = meant[0]
        return tuple(found)

    def check_full_attention(self, count: int) -> int:
        """Returns K, or raises UserError when there are not so many layers that may have full attention."""
        most = len(self.may_be_full)
        if not 0 <= count <= most:
            raise UserError(f"{count} full-attention layers asked of {most}: choose 0 to {most}")
        return count

    def is_original(self, layer: int, name: str) -> bool:
        """Whether a layer keeps what the model has there."""
        return name == self.choices[layer][0]

    def first_changed(self, placement: Placement) -> int:
        """The first layer that differs from the model's own; the number of layers where none does."""
        changed = (i for i, name in enumerate(placement) if not self.is_original(i, name))
        return next(changed, self.num_layers)

    def alternatives(self, layer: int) -> tuple[str, ...]:
        """The names of a layer that are not its original."""
        return self.choices[layer][1:]

    def efficient(self, layer: int) -> tuple[str, ...]:
        """The names of a layer that are not full attention, its original among them where that is none."""
        return tuple(name for name in self.choices[layer] if not is_full(name))

    @property
    def efficient_names(self) -> tuple[str, ...]:
        """The names that are legal somewhere and are not full attention."""
        return tuple(name for name in self.names if not is_full(name))

    def with_full_attention(self, placement: Placement, layers: frozenset[int]) -> Placement:
        """The placement with full attention at `layers` and unchanged elsewhere."""
        return tuple(FULL if i in layers else name for i, name in enumerate(placement))

    def evenly(self, count: int) -> frozenset[int]:
        """K layers with full attention, spread evenly over those that may have it: the baseline of every search.

        Each stands in the middle of its share of the depth, so K = 1 is the middle layer. Raises UserError for a bad K.
        """
        self.check_full_attention(count)
        return frozenset(self.may_be_full[int((i + 0.5) * len(self.may_be_full) / count)] for i in range(count))

    def homogeneous(self, name: str) -> Placement:
        """The name in every layer where it is legal, each layer's original elsewhere."""
        return tuple(name if name in names else names[0] for names in self.choices)

    def without_full(self, names: tuple[str, ...]) -> list[Placement]:
        """For each name that every layer may have: all layers have it, none has full attention."""
        return [(n,) * self.num_layers for n in names if n != FULL and all(n in legal for legal in self.choices)]

    def without(self, names: Collection[str]) -> Space:
        """The space without some alternatives; originals stay."""
        return Space(tuple((own, *(n for n in rest if n not in names)) for own, *rest in self.choices))
