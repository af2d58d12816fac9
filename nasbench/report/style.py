"""The look that every figure and the page share: one colour per layer kind, and the roles of all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nasbench.model import MIXERS
from nasbench.spaces.placement import split_name

# Okabe and Ito's palette, told apart with every common colour blindness, on light and on dark paper. The second line is
# for the rarer kinds: with more than eight colours some pairs are close, and strips stand beside their letters.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b3a800", "#8c6bb1", "#a6761d",
    "#7f8fa9", "#44aa99", "#c4548a", "#8a5a44",
)  # fmt: skip
_OTHER = "#999999"
_ORDER = "AWJGDMLRTKCN"
"""Kinds in the order in which they get colours, so that a new kind changes no other one's."""

# Stand-ins that the SVG text is searched for: the page replaces them by its own light and dark colours.
INK, MUTED, GRID, PAPER, SOFT = "#1b1f26", "#5d6672", "#e2e5ea", "#fefefe", "#aeb6c0"
ACCENT, WARN, HEAT = "#0b63ce", "#b35c01", "#0d5fa8"
ROLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper", SOFT: "--soft", ACCENT: "--accent",
    WARN: "--warn", HEAT: "--heat",
}  # fmt: skip

_DASHES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def colour(name: str) -> str:
    """The colour of a layer name's kind; grey for a kind that is not registered. The first colour is given once."""
    letter = split_name(name)[0]
    if letter not in MIXERS:
        return _OTHER
    place = [*_ORDER, *(kind for kind in MIXERS if kind not in _ORDER)].index(letter)
    return PALETTE[place] if place < len(PALETTE) else PALETTE[1 + place % (len(PALETTE) - 1)]


def css_class(name: str) -> str:
    """The class of a layer name's kind on the page."""
    return f"k-{split_name(name)[0]}"


def dash(position: int) -> object:
    """A line style, so that lines differ in more than colour."""
    return _DASHES[position % len(_DASHES)]


def hatch(axes: Any) -> None:
    """Marks a chart whose numbers are estimated."""
    axes.patch.set(hatch="///", edgecolor=GRID, linewidth=0)


@contextmanager
def theme(salt: str) -> Iterator[None]:
    """matplotlib's settings inside. `salt` keeps the ids of several SVGs on one page apart, and the same every time."""
    import matplotlib

    settings: Any = {
        "font.size": 9.0, "font.family": ["DejaVu Sans"], "svg.fonttype": "none", "svg.hashsalt": salt,
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "text.color": INK,
        "axes.labelcolor": MUTED, "axes.edgecolor": SOFT, "axes.linewidth": 0.8, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "axes.titlesize": 9.5,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.labelsize": 9.0,
        "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": SOFT, "ytick.color": SOFT,
        "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.8, "lines.markersize": 4.5,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield
