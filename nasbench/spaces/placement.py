"""A placement: one layer-kind name per layer, written as a short string.

`14J A 4J A 2W 6J` is Jet-Nemotron-2B: a number before a letter repeats it. A name is a letter, optionally with the
kind's arguments behind it (`W1152`, `J@12x96x256`). Spaces are optional between bare letters; a name with arguments
ends at a space or comma, because a number directly before a letter always means repetition.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import groupby

from nasbench.core.errors import UserError

Placement = tuple[str, ...]
MOST_LAYERS = 10_000

_NAME = re.compile(r"[A-Z](?:@?\d[0-9x.]*)?")
_GROUP = re.compile(r"(\d*)([A-Z](?:@\d[0-9x.]*(?=[\s,]|$)|\d+(?=[\s,]|$))?)")


def parse_placement(text: str, num_layers: int | None = None) -> Placement:
    """Reads a placement string.

    Args:
        text: e.g. `"28A"`, `"14J A 4J A 2W 6J"`, `"2W1152 J@12x96x256"`.
        num_layers: the model's layer count, checked if given.

    Raises:
        UserError: on a character that is not a placement's, a repeat of 0, or the wrong number of layers.
    """
    layers: list[str] = []
    position = 0
    while position < len(text):
        if text[position] in " ,\t":
            position += 1
            continue
        match = _GROUP.match(text, position)
        if match is None:
            raise UserError(
                f"bad placement {text!r} at {text[position : position + 8]!r}: "
                "write letters with an optional number before them, as 14J A 4J A 2W 6J"
            )
        repeat = int(match[1][:9] or 1)
        if repeat == 0:
            raise UserError(f"bad placement {text[:60]!r}: {match[0][:60]!r} repeats a layer 0 times")
        if len(layers) + repeat > MOST_LAYERS:
            raise UserError(f"bad placement {text[:60]!r}: more than {MOST_LAYERS} layers")
        layers.extend([match[2]] * repeat)
        position = match.end()
    if num_layers is not None and len(layers) != num_layers:
        raise UserError(f"placement {text!r} has {len(layers)} layers, the model has {num_layers}")
    if not layers:
        raise UserError("empty placement: write one letter per layer, as 14J A 4J A 2W 6J")
    return tuple(layers)


def format_placement(placement: Placement) -> str:
    """The canonical string: runs of equal layers counted, one space between runs. Inverse of parse_placement."""
    runs = [(name, len(list(group))) for name, group in groupby(placement)]
    for name, _ in runs:
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a layer-kind name: {name!r}")
    return " ".join(f"{count if count > 1 else ''}{name}" for name, count in runs)


def split_name(name: str) -> tuple[str, str]:
    """The kind's letter of a layer name, and its arguments: `J@12x96x256` -> (`J`, `12x96x256`), `W` -> (`W`, ``)."""
    return name[0], name[1:].removeprefix("@")


def is_of(name: str, letters: Collection[str]) -> bool:
    """Whether a layer name is of one of the kinds with these letters."""
    return name[0] in letters


def with_kind(placement: Placement, name: str) -> Placement:
    """The placement with this name for every layer of its kind."""
    return tuple(name if is_of(own, name[0]) else own for own in placement)
