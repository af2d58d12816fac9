"""The figures of a comparison: measures against the number of full-attention layers, length, speed and training."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from nasbench.core.sizes import format_size
from nasbench.evaluation.scores import Z95
from nasbench.report import style
from nasbench.report.comparison import Comparison, column, length_of
from nasbench.report.drawing import Draw, Drawing, new_figure
from nasbench.search.compared import BEST, FINAL, SUPERNET
from nasbench.search.trials import DRAWN, TEACHER, UNIFORM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOKS = tuple(zip(style.PALETTE[:9], "os^Dvp*PX", strict=True)) * 9
"""Colours and markers, again and again."""
DRAWN_LABEL, FINAL_LABEL = "random", "finalised"


def comparison_drawings(found: Comparison) -> dict[str, tuple[str, Draw]]:
    """(title, function of `narrow`) of every figure that the measurements allow, by file name."""
    table = found.table()
    if "kl" not in table or not found.measured:
        return {}
    made: dict[str, tuple[str, Draw]] = {}
    measures = {
        "loss_above_teacher": "Held-out loss above the model's, nats a token",
        "kl": "KL to the model on held-out text, nats a token",
        "suite_kept": "Share of the model's benchmark average above chance",
    }
    measures |= {column(task): f"Retrieval, {format_size(length_of(task))} tokens" for task in found.tasks("retrieval")}
    for name, title in measures.items():
        # A curve over K takes more than the finalised placements; the figure over length shows those.
        if name in table and table.loc[table[name].notna(), "k"].nunique() > 2:
            made[name.replace("_", "-")] = title, partial(_by_count, table, name, title)
    if len(found.tasks("retrieval")) > 1:
        made["retrieval"] = "Retrieval by length", partial(_by_length, found)
    for context in found.contexts:
        at = format_size(context)
        made[f"kl-against-speed-{at}"] = f"KL against decode speed at {at}", partial(_against_speed, table, at)
    curve = found.curve()
    if len(curve) and curve["tokens"].nunique() > 1:
        made["finalising"] = "What more tokens of finalising bring", partial(_curve, curve)
    return made


def _series(table: pd.DataFrame, name: str) -> dict[str, pd.DataFrame]:
    """The rows with a measure by what a legend calls them; random placements first, finalised ones last."""
    known = table[table[name].notna() & (table["fill"] == BEST) & (table["method"] != TEACHER)]
    if name == "suite_kept" and len(known):
        # A few items lie wider apart than placements do.
        known = known[known["suite_items"] == known["suite_items"].max()]
    drawn = known["method"].str.startswith(DRAWN)
    found = {DRAWN_LABEL: known[drawn]}
    searched = known[~drawn & (known["weights"] == SUPERNET)]
    for method, rows in searched.groupby("method", sort=False):
        found["evenly spread" if method == UNIFORM else str(method)] = rows
    for weights, rows in known[known["weights"].str.startswith(FINAL)].groupby("weights", sort=False):
        found[", ".join([FINAL_LABEL, *str(weights).split(":")[1:]])] = rows
    return {label: rows.sort_values("k") for label, rows in found.items() if len(rows)}


def _looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each label."""
    named = [label for label in labels if label != DRAWN_LABEL]
    found = {DRAWN_LABEL: (style.SOFT, "."), **dict(zip(named, LOOKS, strict=False))}
    return {name: {"color": colour, "marker": marker, "label": name} for name, (colour, marker) in found.items()}


def _errors(rows: pd.DataFrame, name: str) -> pd.Series:
    """Half of each 95 % interval."""
    return Z95 * rows[f"{name}_se"].fillna(0.0)


def _by_count(table: pd.DataFrame, name: str, title: str, narrow: bool) -> Drawing:
    """Random placements as dots, searches as lines, finalised placements as marks; the model as a dotted line."""
    drawing = Drawing(new_figure(narrow, 3.4, 3.2))
    axes = drawing.figure.subplots()
    series = _series(table, name)
    looks = _looks(series)
    for label, rows in series.items():
        line = "none" if label.startswith((DRAWN_LABEL, FINAL_LABEL)) else "-"
        size = 8 if label.startswith(FINAL_LABEL) else 5
        errors = None if label == DRAWN_LABEL else _errors(rows, name)
        axes.errorbar(rows["k"], rows[name], errors, linestyle=line, markersize=size, capsize=2, **looks[label])
    for value in table.loc[table["method"] == TEACHER, name].dropna():
        axes.axhline(value, color=style.MUTED, linewidth=0.8, linestyle=":")
    axes.set_xticks(sorted(set(table["k"]) - set(table.loc[table["method"] == TEACHER, "k"])))
    axes.set_xlabel("K, layers with full attention")
    axes.set_title(title)
    _legend(drawing, axes)
    return drawing


def _by_length(found: Comparison, narrow: bool) -> Drawing:
    """Retrieval of the model, of finalised placements, and of those before they were finalised."""
    drawing = Drawing(new_figure(narrow, 3.4, 3.2))
    axes = drawing.figure.subplots()
    tasks = found.tasks("retrieval")
    lengths = [length_of(task) for task in tasks]
    finalised = {row.placement for row in found.rows if row.weights == FINAL}
    for row in found.rows:
        before = row.weights == SUPERNET and row.placement in finalised and row.fill == BEST
        scores = [found.scores(row, task) for task in tasks]
        known = [score for score in scores if score is not None]
        if not (row.method == TEACHER or row.weights == FINAL or before) or len(known) < len(scores):
            continue
        label = (
            "the model itself" if row.method == TEACHER else f"K = {row.k}, {'before it' if before else FINAL_LABEL}"
        )
        line = ":" if row.method == TEACHER else "--" if before else "-"
        if label in axes.get_legend_handles_labels()[1]:
            continue
        axes.errorbar(
            lengths, [score.value for score in known], yerr=[Z95 * score.stderr for score in known], marker="o",
            markersize=4, capsize=2, linestyle=line, label=label,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_size(length) for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of right answers")
    axes.set_ylim(bottom=0)
    axes.set_title("Retrieval by length")
    _legend(drawing, axes)
    return drawing


def _against_speed(table: pd.DataFrame, at: str, narrow: bool) -> Drawing:
    drawing = Drawing(new_figure(narrow, 3.4, 3.2))
    axes = drawing.figure.subplots()
    speed = f"decode_tok_s_{at}"
    series = _series(table[table[speed].notna()], "kl")
    looks = _looks(series)
    for label, rows in series.items():
        axes.plot(rows[speed], rows["kl"], linestyle="none", **looks[label])
    axes.set_xlabel(f"measured decode tokens/s at {at}")
    axes.set_ylabel("KL to the model, nats a token")
    axes.set_title("KL against decode speed")
    _legend(drawing, axes)
    return drawing


def _curve(curve: pd.DataFrame, narrow: bool) -> Drawing:
    drawing = Drawing(new_figure(narrow, 3.2, 5.4))
    charts = drawing.figure.subplots(*((2, 1) if narrow else (1, 2)))
    for axes, name, label in zip(
        charts, ("kl", "retrieval"), ("KL, nats a token", "share of right answers"), strict=True
    ):
        for count, rows in curve[curve["weights"] == FINAL].groupby("k"):
            axes.errorbar(
                rows["tokens"] / 1e6, rows[name], yerr=_errors(rows, name), marker="o", capsize=2, label=f"K = {count}"
            )
        axes.set_xlabel("million tokens of finalising")
        axes.set_ylabel(label)
        axes.legend()
    return drawing


def _legend(drawing: Drawing, axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        drawing.figure.legend(loc="outside lower center", ncols=3)
