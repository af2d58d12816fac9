"""The report's figures as matplotlib axes, for notebooks: `nb.plot.front("runs/mine")`.

Every function takes a run's folder and returns the axes that it drew, a tuple of `matplotlib.axes.Axes`;
`axes[0].figure` is the figure. Raises UserError for a folder that is no run, and for a run without data for the figure.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.errors import UserError
from nasbench.report.facts import collect
from nasbench.report.figures import drawings
from nasbench.report.style import theme
from nasbench.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _axes(name: str, run: str | Path, db: str | Path | None = None) -> tuple[Axes, ...]:
    opened = Run.open(Path(run))
    known = drawings(collect(opened, Path(db) if db else None))
    if name not in known:
        raise UserError(f"{opened.path} has no data for the figure {name} (there are: {', '.join(known) or 'none'})")
    with theme(name):
        figure = known[name](False).figure
        figure.draw_without_rendering()
    return tuple(figure.axes)


front = partial(_axes, "pareto")
"""Accuracy against predicted decode speed: what was tried, the front, and its placements."""
importance = partial(_axes, "layer-importance")
"""What each layer costs replaced alone, by task and layer kind."""
whole = partial(_axes, "whole-model")
"""Decode, prompt, memory and energy against the context, the recommended placement beside full attention."""
layers = partial(_axes, "speed-and-cache")
"""Decode time and cache of one layer of every kind against the context."""
roofline = partial(_axes, "roofline")
"""What every profiled block reached of the device's bandwidth and matrix rate."""
validation = partial(_axes, "predicted-against-measured")
"""Predicted against measured decode speed."""
training = partial(_axes, "training")
"""Losses while the alternatives were trained."""
