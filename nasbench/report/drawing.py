"""What all figures share: a drawn figure with its tips, its size, ticks.

Every figure is drawn twice, wide and narrow, because a wide one on a phone is not readable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDE_IN, NARROW_IN = 9.0, 3.9


@dataclass
class Drawing:
    """A drawn figure, and what the page shows at its points by their ids: a text, and a placement as a strip."""

    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)
    placements: dict[str, str] = field(default_factory=dict)


Draw = Callable[[bool], Drawing]
"""Draws a figure; the argument is whether it is narrow."""


def new_figure(narrow: bool, height: float, narrow_height: float) -> Figure:
    """A figure as wide as its place on the page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(NARROW_IN if narrow else WIDE_IN, narrow_height if narrow else height), layout="constrained")


def thousands(axis: Axis) -> None:
    """`20,000` at an axis."""
    axis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def log_ticks(axes: Axes) -> None:
    """Labels at 1, 2 and 5 of every decade, so that a short logarithmic axis has more than one."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    thousands(axes.yaxis)
