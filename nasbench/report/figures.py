"""The figures of a report: each draws facts, and computes nothing that a number in the text would rest on.

Every figure is drawn twice, wide and narrow, because a wide one on a phone is not readable. `tips` maps the ids of
drawn points to what the page shows when they are pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nasbench.core.sizes import format_size
from nasbench.report import style
from nasbench.report.facts import Facts, Point, TargetFacts
from nasbench.search.trials import UNIFORM
from nasbench.spaces.space import is_full

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE_IN, NARROW_IN = 9.0, 3.9
STRIPS = 14
"""Placements that fit beside a Pareto figure; the table has all."""
STAGES = {
    "align": ("Alignment", "relative error of a layer"),
    "supernet": ("Random sub-networks", "KL, nats a token"),
}
"""Title and unit of a training stage's losses."""


@dataclass
class Drawing:
    """A drawn figure and its tips."""

    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)


def new_figure(narrow: bool, height: float, narrow_height: float) -> Figure:
    """A figure as wide as its place on the page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(NARROW_IN if narrow else WIDE_IN, narrow_height if narrow else height), layout="constrained")


def _note(number: float, form: str) -> str:
    return "unknown" if math.isnan(number) else format(number, form)


def shown_points(points: Sequence[Point], most: int = STRIPS) -> list[Point]:
    """The points that get a number and a strip: both ends of the front, and others as far apart as room needs."""
    if len(points) <= 2:
        return list(points)
    speeds = [point.row.decode_tok_s for point in points]
    room = (max(speeds) - min(speeds)) / (most - 1)
    chosen = [points[0]]
    for point in points[1:-1]:
        gaps = (abs(point.row.decode_tok_s - other.row.decode_tok_s) for other in (chosen[-1], points[-1]))
        if min(gaps) >= 0.8 * room and len(chosen) < most - 1:
            chosen.append(point)
    return [*chosen, points[-1]]


def pareto(target: TargetFacts, narrow: bool) -> Drawing:
    """Loss against decode tokens/s: trials, even spreads, the front with ranks, and its placements as strips."""
    points = shown_points(target.points, STRIPS - 4 if narrow else STRIPS)
    rows = len(points)
    drawing = Drawing(new_figure(narrow, 4.4, 3.6 + 0.24 * rows))
    if narrow:
        plot, strips = drawing.figure.subplots(2, 1, height_ratios=[3.2, 0.24 * rows + 0.3])
    else:
        plot, strips = drawing.figure.subplots(1, 2, width_ratios=[1.5, 1])
    _cloud(plot, target, drawing)
    _front(plot, target.points, points, 9.5 if narrow else 11.5, drawing)
    cut = _limits(plot, target)
    plot.set_xlabel("decode tokens/s, predicted" + (" (~ estimated rows)" if target.estimated else ""))
    plot.set_ylabel(target.measure)
    plot.set_title("Accuracy against speed")
    plot.legend(loc="best")
    if cut:
        plot.set_title(f"{cut} more above", loc="right", fontsize=8, fontweight="normal")
    _strips(strips, points)
    return drawing


def _cloud(plot: Axes, target: TargetFacts, drawing: Drawing) -> None:
    others = [(t.decode_tok_s, t.front_score) for t in target.trials if t.strategy != UNIFORM]
    dots: dict[str, Any] = {"color": style.SOFT, "markersize": 2.6, "alpha": 0.75, "markeredgewidth": 0}
    plot.plot(*(zip(*others, strict=True) if others else ([], [])), "o", label="tried", zorder=2, **dots)
    look: dict[str, Any] = {"markerfacecolor": style.PAPER, "markeredgecolor": style.MUTED, "markersize": 5}
    for index, trial in enumerate(target.even):
        name, label = f"uniform-{index}", None if index else "even spread"
        plot.plot([trial.decode_tok_s], [trial.front_score], "D", label=label, gid=name, zorder=3, **look)
        drawing.tips[name] = (
            f"even spread, K = {trial.k}\n{trial.placement}\nloss {trial.loss:.4f}, {trial.decode_tok_s:,.1f} tokens/s"
        )


def _front(plot: Axes, front: Sequence[Point], points: Sequence[Point], size: float, drawing: Drawing) -> None:
    """The line through the whole front; numbers at `points`, in circles of `size`."""
    x, y = [point.row.decode_tok_s for point in front], [point.row.front_score for point in front]
    plot.plot(x, y, "-", color=style.INK, linewidth=1.2, zorder=4, label="front")
    plot.plot(x, y, "o", color=style.INK, markersize=3, zorder=4)
    for point in points:
        row, name = point.row, f"point-{point.row.rank}"
        plot.plot(
            [row.decode_tok_s], [row.front_score],
            "o", markersize=size, color=style.INK, markeredgecolor=style.PAPER, gid=name, zorder=5,
        )  # fmt: skip
        plot.annotate(
            str(row.rank), (row.decode_tok_s, row.front_score), color=style.PAPER, ha="center", va="center_baseline",
            fontsize=0.66 * size, fontweight="bold", zorder=6, gid=f"{name}-rank",
        )  # fmt: skip
        measured = "" if math.isnan(point.measured_tok_s) else f", measured {point.measured_tok_s:,.1f}"
        drawing.tips[name] = (
            f"{row.rank}. {row.placement}\nK = {row.k}, found by {row.strategy}\n"
            f"loss {row.loss:.4f} ± {_note(row.loss_stderr, '.4f')} (+{_note(point.delta, '.4f')})\n"
            f"{row.decode_tok_s:,.1f} tokens/s predicted{measured}\n"
            f"{_note(point.speedup, '.2f')} × full attention, cache {row.cache_bytes / 2**20:,.2f} MiB"
        )


def _limits(plot: Axes, target: TargetFacts) -> int:
    """Shows the front and the best even spreads whole. Returns how many trials are cut off above."""
    wanted = [point.row.front_score for point in target.points]
    for count in {trial.k for trial in target.even}:
        wanted.append(min(trial.front_score for trial in target.even if trial.k == count))
    low, high = min(wanted), max(wanted)
    margin = (high - low) or 0.05
    top = high + 0.25 * margin
    plot.set_ylim(low - 0.07 * margin, top)
    return sum(trial.front_score > top for trial in target.trials)


def _strips(axes: Axes, points: Sequence[Point]) -> None:
    """One row a point: rank, its layers as cells (full attention tall), and the speed-up."""
    from matplotlib.patches import Rectangle

    layers = max(len(point.row.layers) for point in points)
    for place, point in enumerate(points):
        for layer, name in enumerate(point.row.layers):
            height = 0.78 if is_full(name) else 0.46
            axes.add_patch(
                Rectangle((layer, place + 0.39 - height), 0.86, height, color=style.colour(name), linewidth=0)
            )
        axes.text(-0.7, place, str(point.row.rank), ha="right", va="center", fontweight="bold", fontsize=8)
        gain = _note(point.speedup, ".2f")
        axes.text(layers + 0.6, place, f"{gain}×", ha="left", va="center", color=style.MUTED, fontsize=8)
    axes.set_xlim(-0.07 * layers, 1.14 * layers)
    axes.set_ylim(len(points) - 0.4, -0.8)
    axes.set_title("Layers, first to last; speed-up")
    axes.set_axis_off()


def importance(facts: Facts, narrow: bool) -> Drawing:
    """KL to the full-attention model of each layer replaced alone (the loss where an older file has no KL), one small
    chart a layer kind, each with its own scale."""
    names = list(dict.fromkeys(row.name for row in facts.importance))
    drawing = Drawing(new_figure(narrow, 0.4 + 1.35 * len(names), 0.4 + 1.35 * len(names)))
    charts = drawing.figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(charts, names, strict=True):
        rows = [row for row in facts.importance if row.name == name]
        for row in rows:
            gid = f"importance-{name.replace('@', '-').replace('.', '-')}-{row.layer}"
            height = row.loss_increase if math.isnan(row.kl) else row.kl
            axes.bar([row.layer], [height], color=style.colour(name), width=0.8, gid=gid)
            drawing.tips[gid] = f"layer {row.layer} replaced by {name}\nKL {row.kl:.4f}, loss {row.loss_increase:+.4f}"
        axes.axhline(0, color=style.SOFT, linewidth=0.8)
        axes.grid(visible=False, axis="x")
        axes.set_title(facts.title(name))
        axes.margins(x=0.01)
    charts[-1].set_xlabel("layer, from the first")
    drawing.figure.supylabel("KL to the model, nats a token", fontsize=9, color=style.MUTED)
    return drawing


def contexts(facts: Facts, narrow: bool) -> Drawing:
    """Decode time and cache of one layer of every kind against the context."""
    drawing = Drawing(new_figure(narrow, 3.3, 5.6))
    time, cache = drawing.figure.subplots(*((2, 1) if narrow else (1, 2)))
    for position, (name, rows) in enumerate(facts.curves.groupby("name", sort=False)):
        colour, title = style.colour(str(name)), facts.title(str(name))
        shared: dict[str, Any] = {"color": colour, "linestyle": style.dash(position), "label": title}
        time.fill_between(rows["context"], rows["low_us"], rows["high_us"], color=colour, alpha=0.15, lw=0)
        time.plot(rows["context"], rows["us"], **shared)
        cache.plot(rows["context"], rows["cache_bytes"] / 2**20, marker="o", **shared)
        points: Iterable[Any] = rows.itertuples()
        for index, row in enumerate(points):
            gid = f"curve-{position}-{index}"
            fill = style.PAPER if row.estimated else colour
            time.plot([row.context], [row.us], "o", color=colour, markerfacecolor=fill, gid=gid)
            drawing.tips[gid] = (
                f"{title}\ncontext {format_size(int(row.context))}, batch {row.batch}\n"
                f"{row.us:,.1f} µs {'estimated' if row.estimated else 'measured'}, "
                f"cache {row.cache_bytes / 2**20:,.3f} MiB a layer"
            )
    ticks = sorted(set(facts.curves["context"]))
    for axes, title, label in ((time, "Decode step", "µs a layer"), (cache, "Cache", "MiB a layer")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [format_size(tick) for tick in ticks])
        _log_ticks(axes)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(label)
        axes.set_title(title)
    time.legend(loc="upper left")
    return drawing


def _log_ticks(axes: Axes) -> None:
    """Labels at 1, 2 and 5 of every decade, so that a short logarithmic axis has more than one."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def validation(facts: Facts, narrow: bool) -> Drawing:
    """Predicted against measured decode tokens/s, with the line of no error and a band of 10 %."""
    drawing = Drawing(new_figure(narrow, 3.6, 3.5))
    axes = drawing.figure.subplots()
    numbers = [value for row in facts.validation for value in (row.predicted_tok_s, row.measured_tok_s)]
    low, high = 0.9 * min(numbers), 1.1 * max(numbers)
    axes.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color=style.GRID, lw=0, alpha=0.7)
    axes.plot([low, high], [low, high], color=style.SOFT, linewidth=1)
    devices = list(dict.fromkeys(row.device for row in facts.validation))
    for device, marker in zip(devices, "osD^v" * len(devices), strict=False):
        rows = [row for row in facts.validation if row.device == device]
        for index, row in enumerate(rows):
            gid = f"validation-{devices.index(device)}-{index}"
            axes.plot(
                [row.measured_tok_s], [row.predicted_tok_s], marker, color=style.INK, gid=gid,
                label=device if index == 0 else None,
            )  # fmt: skip
            drawing.tips[gid] = (
                f"{row.placement}\ncontext {format_size(row.context)}, batch {row.batch}\n"
                f"predicted {row.predicted_tok_s:,.1f}, measured {row.measured_tok_s:,.1f} ({row.error:+.1%})"
            )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("measured tokens/s")
    axes.set_ylabel("predicted tokens/s")
    axes.annotate("band: ±10 %", (0.98, 0.04), xycoords="axes fraction", ha="right", color=style.MUTED, fontsize=8)
    axes.legend(loc="upper left")
    return drawing


def training(facts: Facts, narrow: bool) -> Drawing:
    """Logged losses by training tokens, one chart a stage."""
    stages = facts.training["stage"].unique()
    drawing = Drawing(new_figure(narrow, 2.8, 2.5 * len(stages)))
    grid = (len(stages), 1) if narrow else (1, len(stages))
    charts = drawing.figure.subplots(*grid, squeeze=False).flatten()
    for axes, stage in zip(charts, stages, strict=True):
        rows = facts.training[facts.training["stage"] == stage]
        for position, (name, curve) in enumerate(rows.groupby("name", sort=False)):
            label = facts.title(str(name)) if name else "whole network"
            axes.plot(
                curve["tokens"], curve["loss"], color=style.colour(str(name)) if name else style.INK,
                linestyle=style.dash(position), linewidth=1.4, label=label,
            )  # fmt: skip
        if (rows["loss"] > 0).all():
            axes.set_yscale("log")
            _log_ticks(axes)
        title, unit = STAGES.get(str(stage), (str(stage), "loss"))
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,g}k" if value else "0")
        axes.legend(loc="upper right")
    return drawing


Draw = Callable[[bool], Drawing]


def drawings(facts: Facts) -> dict[str, Draw]:
    """The figures that these facts have, by file name: functions of `narrow`."""
    fronts = [target for target in facts.targets if target.points]
    found: dict[str, Draw] = {
        "pareto" + (f"-{number}" if number > 1 else ""): partial(pareto, target)
        for number, target in enumerate(fronts, 1)
    }
    for name, draw, rows in (
        ("layer-importance", importance, facts.importance),
        ("speed-and-cache", contexts, facts.curves),
        ("predicted-against-measured", validation, facts.validation),
        ("training", training, facts.training),
    ):
        if len(rows):
            found[name] = partial(draw, facts)
    return found
