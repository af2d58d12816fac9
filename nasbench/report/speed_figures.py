"""The figures of speed, memory and energy: whole models and layers over the context, the roofline, errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from nasbench.core.sizes import format_size
from nasbench.report import style
from nasbench.report.drawing import Drawing, log_ticks, new_figure, thousands
from nasbench.report.facts import Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = {
    "decode_tok_s": ("Decode", "tokens/s, all sequences", 1.0),
    "prefill_tok_s": ("Prompt", "tokens/s, all sequences", 1.0),
    "needed_bytes": ("Memory", "GiB, weights and caches", 2.0**30),
    "j_per_token": ("Energy of a decode step", "mJ a token", 1e-3),
}
"""Title, unit and its size of each measure of whole models."""


def whole(facts: Facts, narrow: bool) -> Drawing:
    """The recommended placement beside full attention: decode, prompt, memory with its limit, energy."""
    shown = {name: unit for name, unit in UNITS.items() if facts.whole[name].notna().any()}
    columns = 1 if narrow else min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    drawing = Drawing(new_figure(narrow, 2.7 * rows, 2.5 * rows))
    charts = drawing.figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, (title, unit, size)) in zip(charts, shown.items(), strict=False):
        for label, look in (("full attention", (style.INK, "-", "o")), ("recommended", (style.ACCENT, "-", "D"))):
            _whole_line(axes, facts.whole[facts.whole["label"] == label], name, size, label, look, drawing)
        if name == "needed_bytes" and facts.cost and facts.cost.room_bytes:
            limit = facts.cost.room_bytes / size
            axes.axhline(limit, color=style.WARN, linestyle=(0, (6, 2)), linewidth=1.4)
            axes.axhspan(limit, 2 * max(limit, axes.get_ylim()[1]), color=style.WARN, alpha=0.1, lw=0)
            where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"limit {limit:,.0f} GiB", (0.02, limit), (0, 3), color=style.WARN, **where)
        _context_axis(axes, sorted(facts.whole["context"].unique()))
        axes.set_title(title)
        axes.set_ylabel(unit)
    for axes in charts[len(shown) :]:
        axes.set_axis_off()
    charts[0].legend(loc="best")
    return drawing


def _whole_line(
    axes: Axes, rows: pd.DataFrame, name: str, size: float, label: str, look: tuple[str, str, str], drawing: Drawing
) -> None:
    """Predicted points hollow where they are estimated; nothing where rows are missing."""
    colour, line, marker = look
    known = rows[rows[name].notna()]
    axes.plot(known["context"], known[name] / size, line, color=colour, label=label)
    for cell in known.to_dict("records"):
        guess = bool(cell["estimated"]) and name != "needed_bytes"
        gid = f"whole-{name}-{label.split()[0]}-{cell['context']}"
        fill = style.PAPER if guess else colour
        axes.plot([cell["context"]], [cell[name] / size], marker, color=colour, markerfacecolor=fill, gid=gid)
        basis = "by formula" if name == "needed_bytes" else "estimated" if guess else "predicted"
        fits = "" if cell["fits"] is not False else "\ndoes not fit in the memory"
        drawing.tips[gid] = (
            f"{label}: {cell['placement']}\ncontext {format_size(int(cell['context']))}, batch {cell['batch']}\n"
            f"{cell[name] / size:,.4g} {UNITS[name][1]}, {basis}{fits}"
        )
    if known["estimated"].any() and name != "needed_bytes":
        style.hatch(axes)


def _context_axis(axes: Axes, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    step = max(1, math.ceil(len(ticks) / 6))
    axes.set_xticks(ticks[::-step][::-1], [format_size(int(tick)) for tick in ticks[::-step][::-1]])
    log_ticks(axes)
    axes.set_xlabel("context, tokens")


def layers(facts: Facts, narrow: bool) -> Drawing:
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
        _context_axis(axes, ticks)
        axes.set_ylabel(label)
        axes.set_title(title)
    if facts.curves["estimated"].any():
        style.hatch(time)
    time.legend(loc="upper left")
    return drawing


def roofline(facts: Facts, narrow: bool) -> Drawing:
    """What every profiled block reached against its arithmetic intensity, under the device's own measured ceilings."""
    table = facts.roofline
    drawing = Drawing(new_figure(narrow, 3.8, 3.8))
    axes = drawing.figure.subplots()
    bandwidth, peak = float(table["bandwidth_gb_s"].iloc[0]), float(table["peak_tflop_s"].iloc[0])
    low, high = 0.5 * table["flops_per_byte"].min(), 2.0 * max(table["flops_per_byte"].max(), 1e3 * peak / bandwidth)
    corner = 1e3 * peak / bandwidth
    roof = [(x, min(peak, bandwidth * x / 1e3)) for x in (low, corner, high)]
    axes.plot(
        *zip(*roof, strict=True), color=style.INK, linewidth=1.4, label=f"{bandwidth:,.0f} GB/s, {peak:,.3g} TFLOP/s"
    )
    labels = set()
    for index, row in enumerate(table.to_dict("records")):
        colour = style.SOFT if row["shared"] else style.colour(row["name"])
        marker, gid = "o" if row["mode"] == "decode" else "s", f"roof-{index}"
        label = f"{'shared blocks' if row['shared'] else row['name']}, {row['mode'].replace('prefill', 'prompt')}"
        axes.plot(
            [row["flops_per_byte"]], [row["tflop_s"]], marker, color=colour, gid=gid, alpha=0.85, linestyle="none",
            markerfacecolor=style.PAPER if row["estimated"] else colour, label=None if label in labels else label,
        )  # fmt: skip
        labels.add(label)
        allowed = min(peak, bandwidth * row["flops_per_byte"] / 1e3)
        drawing.tips[gid] = (
            f"{row['name']}, {row['mode']}, context {format_size(row['context']) if row['context'] else 'any'}, "
            f"batch {row['batch']}\n{row['gb_s']:,.0f} GB/s, {row['tflop_s']:,.3g} TFLOP/s\n"
            f"{row['tflop_s'] / allowed:.0%} of the roof"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, FLOP a byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("Roofline")
    drawing.figure.legend(loc="outside lower center" if narrow else "outside right center", ncols=2 if narrow else 1)
    return drawing


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
    thousands(axes.xaxis)
    thousands(axes.yaxis)
    axes.set_xlabel("measured tokens/s")
    axes.set_ylabel("predicted tokens/s")
    axes.annotate("band: ±10 %", (0.98, 0.04), xycoords="axes fraction", ha="right", color=style.MUTED, fontsize=8)
    axes.legend(loc="upper left")
    return drawing
