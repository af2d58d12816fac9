"""The figures of a report: each draws facts, and computes nothing that a number in the text would rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nasbench.report import style
from nasbench.report.drawing import Draw, Drawing, log_ticks, new_figure, thousands
from nasbench.report.facts import Facts
from nasbench.report.speed_figures import layers, roofline, validation, whole
from nasbench.report.targets import Point, TargetFacts, recommended
from nasbench.report.verdict import plus_minus
from nasbench.search.trials import UNIFORM
from nasbench.spaces.space import is_full

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIPS = 14
"""Placements that fit beside a Pareto figure; the table has all."""
_NO_ID = str.maketrans("@.:+*", "-----")
STAGES = {
    "align": ("Alignment", "relative error of a layer"),
    "supernet": ("Random sub-networks", "KL, nats a token"),
}
"""Title and unit of a training stage's losses."""


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
    best = recommended(target)
    shown = shown_points(target.points, STRIPS - 4 if narrow else STRIPS)
    points = [point for point in target.points if point in shown or point is best]
    rows = len(points)
    drawing = Drawing(new_figure(narrow, 4.4, 3.6 + 0.24 * rows))
    if narrow:
        plot, strips = drawing.figure.subplots(2, 1, height_ratios=[3.2, 0.24 * rows + 0.3])
    else:
        plot, strips = drawing.figure.subplots(1, 2, width_ratios=[1.5, 1])
    low, top = _limits(target)
    cut = sum(trial.front_score > top for trial in target.trials)
    _cloud(plot, target, top, drawing)
    _front(plot, target.points, points, best, 9.5 if narrow else 11.5, drawing)
    plot.set_ylim(low, top)
    plot.set_xlabel("decode tokens/s, " + ("estimated (hatched)" if target.estimated else "predicted"))
    if target.estimated:
        style.hatch(plot)
    plot.set_ylabel(target.measure)
    thousands(plot.xaxis)
    plot.set_title("Accuracy against speed")
    plot.legend(loc="best")
    if cut:
        plot.set_title(f"{cut:,} more above", loc="right", fontsize=8, fontweight="normal")
    _strips(strips, points)
    return drawing


def thinned(points: np.ndarray, cells: int = 160) -> np.ndarray:
    """[N, 2] points without those that hide under another one: one in each cell of a grid over the middle 98 %."""
    low, high = np.nanquantile(points, 0.01, axis=0), np.nanquantile(points, 0.99, axis=0)
    places = np.floor(cells * (points - low) / np.where(high > low, high - low, 1.0))
    return points[np.sort(np.unique(places, axis=0, return_index=True)[1])] if len(points) > cells else points


def _cloud(plot: Axes, target: TargetFacts, top: float, drawing: Drawing) -> None:
    """What was tried and scored below `top`, and the even spreads."""
    others = [trial for trial in target.trials if trial.strategy != UNIFORM and trial.front_score <= top]
    dots: dict[str, Any] = {"color": style.SOFT, "markersize": 2.6, "alpha": 0.75, "markeredgewidth": 0}
    if others:
        shown = thinned(np.array([(trial.decode_tok_s, trial.front_score) for trial in others]))
        label = "tried" if len(shown) == len(others) else f"tried, {len(shown):,} of {len(others):,} drawn"
        plot.plot(shown[:, 0], shown[:, 1], "o", label=label, zorder=2, **dots)
    look: dict[str, Any] = {"markerfacecolor": style.PAPER, "markeredgecolor": style.MUTED, "markersize": 5}
    for index, trial in enumerate(target.even):
        name, label = f"uniform-{index}", "" if index else "even spread"
        plot.plot([trial.decode_tok_s], [trial.front_score], "D", label=label, gid=name, zorder=3, **look)
        drawing.tips[name] = (
            f"even spread, K = {trial.k}\n{trial.placement}\nloss {trial.loss:.4f}, {trial.decode_tok_s:,.1f} tokens/s"
        )


def _front(
    plot: Axes, front: Sequence[Point], points: Sequence[Point], best: Point | None, size: float, drawing: Drawing
) -> None:
    """The line through the whole front; numbers at `points`, in circles of `size`; a ring around the best."""
    x, y = [point.row.decode_tok_s for point in front], [point.row.front_score for point in front]
    plot.plot(x, y, "-", color=style.INK, linewidth=1.2, zorder=4, label="front")
    for point in front:
        plot.plot(
            [point.row.decode_tok_s], [point.row.front_score], "o", color=style.INK, markersize=3.5, zorder=4,
            gid="" if point in points else f"point-{point.row.rank}",
        )  # fmt: skip
        drawing.tips[f"point-{point.row.rank}"] = _tip(point)
        drawing.placements[f"point-{point.row.rank}"] = point.row.placement
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
    if best:
        plot.plot(
            [best.row.decode_tok_s], [best.row.front_score], "o", markersize=size + 7, markerfacecolor="none",
            markeredgecolor=style.ACCENT, markeredgewidth=2, gid="ring", zorder=7, label="recommended",
        )  # fmt: skip


def _tip(point: Point) -> str:
    row = point.row
    lines = [f"{row.rank}. K = {row.k}, found by {row.strategy}", row.placement]
    lines.append(f"loss {row.loss:.4f} ± {_note(row.loss_stderr, '.4f')}, {_note(point.delta, '+.4f')} above the model")
    if point.test.n:
        lines.append(f"on other text {plus_minus(point.test)}")
    lines.append(f"{row.decode_tok_s:,.1f} tokens/s {'estimated' if point.estimated else 'predicted'}")
    if not math.isnan(point.measured_tok_s):
        lines.append(f"{point.measured_tok_s:,.1f} tokens/s measured")
    lines.append(f"{_note(point.speedup, '.2f')} × the model ({point.basis}), cache {row.cache_bytes / 2**20:,.1f} MiB")
    return "\n".join([*lines, *(["scores exactly as the model does"] if point.identical else [])])


def _limits(target: TargetFacts) -> tuple[float, float]:
    """The scores between which the front and the best even spreads are seen whole."""
    wanted = [point.row.front_score for point in target.points]
    for count in {trial.k for trial in target.even}:
        wanted.append(min(trial.front_score for trial in target.even if trial.k == count))
    low, high = min(wanted), max(wanted)
    margin = (high - low) or 0.05
    return low - 0.07 * margin, high + 0.25 * margin


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
    """What each layer costs replaced alone, for every task and kind: stronger is dearer, each task on its own."""
    tasks = facts.importance.groupby("task", sort=False)
    kinds = [len(rows["name"].unique()) for _, rows in tasks]
    heights = [0.62 + 0.24 * count for count in kinds]
    drawing = Drawing(new_figure(narrow, 0.3 + sum(heights), 0.3 + sum(heights)))
    charts = drawing.figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (task, rows) in zip(charts, tasks, strict=True):
        _heat(axes, facts, str(task), rows, drawing)
    charts[-1].set_xlabel("layer, from the first")
    return drawing


def _heat(axes: Axes, facts: Facts, task: str, rows: pd.DataFrame, drawing: Drawing) -> None:
    from matplotlib.patches import Rectangle

    names, most = list(rows["name"].unique()), max(float(rows["value"].max()), 1e-9)
    axes.set_facecolor("none")
    for cell in rows.to_dict("records"):
        layer, place = int(cell["layer"]), names.index(cell["name"])
        gid = f"importance-{task}-{place}-{layer}".translate(_NO_ID)
        share = max(0.0, float(cell["value"])) / most
        look: dict[str, Any] = {"facecolor": style.HEAT, "alpha": 0.06 + 0.94 * share, "edgecolor": "none"}
        axes.add_patch(Rectangle((layer - 0.46, place - 0.44), 0.92, 0.88, gid=gid, **look))
        drawing.tips[gid] = f"layer {layer} replaced by {facts.title(str(cell['name']))}\n{task} {cell['value']:+.4f}"
    axes.set_xlim(-0.6, facts.shape.num_layers - 0.4)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    unit = "nats a token" if task in ("loss", "kl") else "above the model"
    axes.set_title(f"{task}, strongest {most:.3g} {unit}")


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
            log_ticks(axes)
        title, unit = STAGES.get(str(stage), (str(stage), "loss"))
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,g}k" if value else "0")
        axes.legend(loc="best")
    return drawing


def drawings(facts: Facts) -> dict[str, Draw]:
    """The figures that these facts have, by file name: functions of `narrow`."""
    fronts = [target for target in facts.targets if target.points]
    found: dict[str, Draw] = {
        "pareto" + (f"-{number}" if number > 1 else ""): partial(pareto, target)
        for number, target in enumerate(fronts, 1)
    }
    for name, draw, rows in (
        ("layer-importance", importance, facts.importance),
        ("whole-model", whole, facts.whole),
        ("speed-and-cache", layers, facts.curves),
        ("roofline", roofline, facts.roofline),
        ("predicted-against-measured", validation, facts.validation),
        ("training", training, facts.training),
    ):
        if len(rows):
            found[name] = partial(draw, facts)
    return found
