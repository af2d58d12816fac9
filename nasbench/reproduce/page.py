"""Figures and one HTML page of a reproduction's tables."""

from __future__ import annotations

import csv
import html
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.files import atomic_path, write_text
from nasbench.core.sizes import format_size, parse_size
from nasbench.report import style
from nasbench.reproduce.summary import Section
from nasbench.search.trials import TEACHER, UNIFORM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, str]
LOOKS = {
    UNIFORM: ("#0072b2", "o", "evenly spread"),
    "beam": ("#009e73", "s", "beam"),
    "kl-greedy": ("#cc79a7", "^", "KL-greedy"),
    "recall": ("#e69f00", "D", "with retrieval"),
    "final": ("#d55e00", "*", "finalised"),
    "final:average": ("#56b4e9", "P", "finalised, averaged"),
}
"""Colour, marker and name of each method, and of weights that were finalised."""
WORDS = (
    "placement", "search", "searched", "against", "way", "method", "fill", "weights", "benchmark", "scoring",
    "layers", "score", "pairs", "measure",
)  # fmt: skip
"""Columns of words."""
CSS = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:#1b1f26}"
    "table{border-collapse:collapse;font-size:12.5px;display:block;overflow-x:auto;white-space:nowrap}"
    "td,th{padding:.15rem .5rem;border-bottom:1px solid #e2e5ea;text-align:right}"
    "th:first-child,td:first-child{text-align:left}td.words,th.words{text-align:left}"
    "summary{margin:1rem 0;cursor:pointer}"
    "img{max-width:100%}pre{white-space:pre-wrap;background:#f4f5f7;padding:.6rem}"
    ".figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1rem}"
)


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none where it is not there or empty."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _points(rows: Sequence[Row], x: str, y: str) -> list[tuple[float, float, float]]:
    """(x, y, standard error of y) of the rows that have both."""
    found = [
        (float(row[x]), float(row[y]), float(row.get(f"{y}_se") or 0)) for row in rows if row.get(x) and row.get(y)
    ]
    return sorted(found)


def by_count(axes: Axes, rows: Sequence[Row], y: str) -> None:
    """A measure against K: random placements as dots, the methods as lines, finalised ones as stars. Of benchmarks
    those that were asked as many items as any: few items lie wider apart than placements do."""
    best = [row for row in rows if row["fill"] == "best"]
    if y == "suite_kept":
        most = max((int(row["suite_items"]) for row in best if row["suite_items"]), default=0)
        best = [row for row in best if row["suite_items"] == str(most)]
    drawn = _points([row for row in best if row["method"].startswith("random")], "k", y)
    if drawn:
        axes.scatter([p[0] for p in drawn], [p[1] for p in drawn], s=9, color="#aeb6c0", label="random")
    for method, (colour, marker, name) in LOOKS.items():
        finalised = method.startswith("final")
        if finalised:
            mine = [row for row in best if row["weights"] == method]
        else:
            mine = [row for row in best if row["method"] == method and row["weights"] == "supernet"]
        points = _points(mine, "k", y)
        if points:
            axes.errorbar(
                [p[0] for p in points], [p[1] for p in points], yerr=[1.96 * p[2] for p in points], color=colour,
                marker=marker, markersize=9 if finalised else 4.5, label=name, capsize=2,
                linestyle="none" if finalised else "-",
            )  # fmt: skip
    teacher = _points([row for row in rows if row["method"] == TEACHER], "k", y)
    for point in teacher:
        axes.axhline(point[1], color="#5d6672", linewidth=0.8, linestyle=":")
    counts = sorted({int(row["k"]) for row in best if row["method"] != TEACHER and row.get(y)})
    axes.set_xticks(counts)
    axes.set_xlabel("layers of full attention")


def by_length(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Retrieval of the model, of finalised placements, and of those before they were finalised, where they were asked
    at all lengths."""
    lengths = [parse_size(name.split("_")[1]) for name in names]
    finalised = [row for row in rows if row["weights"] == "final"]
    known = [row for row in rows if all(row.get(name) for name in names)]
    for row in known:
        kind = "final" if row["weights"] == "final" else row["method"]
        before = row["weights"] == "supernet" and any(
            (row["placement"], row["method"]) == (other["placement"], other["method"]) for other in finalised
        )
        if kind not in (TEACHER, "final") and not before:
            continue
        values, errors = ([float(row[f"{name}{end}"] or 0) for name in names] for end in ("", "_se"))
        label = (
            "the model itself" if kind == TEACHER else f"{row['k']} layers, {'before it' if before else 'finalised'}"
        )
        axes.errorbar(
            lengths, values, yerr=[1.96 * error for error in errors], marker="o", markersize=4, capsize=2, label=label,
            linestyle=":" if kind == TEACHER else "--" if before else "-",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_size(length) for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of answers that are right")
    axes.set_ylim(bottom=0)


def against_speed(axes: Axes, rows: Sequence[Row], speed: str) -> None:
    """KL against decode speed, of placements with the best fillers."""
    for row in rows:
        if row.get("kl") and row.get(speed) and row["fill"] == "best" and row["method"] != TEACHER:
            method, weights = row["method"], row["weights"]
            if weights.startswith("final"):
                method = weights if weights in LOOKS else "final"
            colour, marker, name = LOOKS.get(method, ("#aeb6c0", ".", "random"))
            known = axes.get_legend_handles_labels()[1]
            label = "_" if name in known else name
            axes.plot(float(row[speed]), float(row["kl"]), marker=marker, color=colour, linestyle="none", label=label)
    axes.set_xlabel("decode tokens/s")
    axes.set_ylabel("KL to the model, nats a token")


def figures(folder: Path) -> list[tuple[str, str]]:
    """Draws PNGs of what the tables hold; (file, title) of each."""
    from matplotlib.figure import Figure

    rows, curve = read(folder / "table.csv"), read(folder / "curve.csv")
    columns = rows[0] if rows else {}
    retrieval = [name for name in columns if name.startswith("retrieval_") and not name.endswith("_se")]
    # A curve over K takes more than what was finalised; how length tells is another figure.
    spread = [name for name in retrieval if len({point[0] for point in _points(rows, "k", name)}) > 4]
    plots: list[tuple[str, str, Callable[[Axes], None]]] = []
    for name, title in (
        ("loss_above_teacher", "Held-out loss above the model's, nats a token"),
        ("kl", "KL to the model on held-out text, nats a token"),
        ("suite_kept", "Share of the model's suite average above chance"),
        *((name, f"Key-value retrieval, {name.split('_')[1]} tokens") for name in spread),
    ):
        if _points(rows, "k", name):
            plots.append((name.replace("_", "-"), title, partial(by_count, rows=rows, y=name)))
    if retrieval:
        plots.append(("retrieval", "Key-value retrieval by length", partial(by_length, rows=rows, names=retrieval)))
    for name in columns:
        if name.startswith("decode_tok_s_") and _points(rows, name, "kl"):
            title = f"KL against decode speed at {name.removeprefix('decode_tok_s_')}"
            plots.append((name.replace("_", "-"), title, partial(against_speed, rows=rows, speed=name)))
    for name, measure, label in (
        ("curve", "kl", "KL to the model, nats a token"),
        ("curve-retrieval", "retrieval", "share of key-value questions answered"),
    ):
        if _points(curve, "tokens", measure):
            title = "What more tokens of finalising bring"
            plots.append((name, title, partial(_curve, curve=curve, measure=measure, label=label)))
    made = []
    for name, title, draw in plots:
        with style.theme(name):
            figure = Figure(figsize=(6.4, 4.2), layout="constrained")
            axes = figure.subplots()
            draw(axes)
            axes.set_title(title)
            if axes.get_legend_handles_labels()[0]:
                figure.legend(loc="outside lower center", ncols=3)
            with atomic_path(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=110)
        made.append((f"{name}.png", title))
    return made


def _curve(axes: Axes, curve: Sequence[Row], measure: str, label: str) -> None:
    for key in dict.fromkeys((row["k"], row["weights"]) for row in curve if row["weights"] == "final"):
        points = _points([row for row in curve if (row["k"], row["weights"]) == key], "tokens", measure)
        axes.errorbar(
            [p[0] / 1e6 for p in points], [p[1] for p in points], yerr=[1.96 * p[2] for p in points], marker="o",
            capsize=2, label=f"K = {key[0]}",
        )  # fmt: skip
    axes.set_xlabel("million tokens")
    axes.set_ylabel(label)


def _table(rows: Sequence[Row]) -> str:
    """An HTML table of a CSV; columns of standard errors stand behind their values as ±, placements at the end."""
    if not rows:
        return "<p>Nothing measured.</p>"
    columns = [name for name in rows[0] if not (name.endswith("_se") and name.removesuffix("_se") in rows[0])]
    columns.sort(key=lambda name: name == "placement")
    shown = [
        [
            html.escape(row[name]) if name == "placement" else _number(row[name], row.get(f"{name}_se"))
            for name in columns
        ]
        for row in rows
    ]
    return _grid([html.escape(name.replace("_", " ")) for name in columns], shown)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML; words stand left, numbers right."""
    kinds = [' class="words"' if name in WORDS else "" for name in head]
    lines = [[f"<th{kind}>{name}</th>" for kind, name in zip(kinds, head, strict=True)]]
    lines += [[f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)] for row in rows]
    return "<table>" + "".join(f"<tr>{''.join(line)}</tr>" for line in lines) + "</table>"


def _section(section: Section) -> str:
    title = f"<h2>{html.escape(section.title)}</h2>" if section.title else ""
    words = f"<p>{html.escape(section.words)}</p>" if section.words else ""
    rows = [[_cell(text) for text in row] for row in section.rows]
    return title + words + _grid([html.escape(name) for name in section.head], rows)


def _cell(text: str) -> str:
    bold, slanted = text.startswith("**"), text.startswith("*")
    text = html.escape(text.strip("*"))
    return f"<b>{text}</b>" if bold else f"<i>{text}</i>" if slanted else text


def _number(text: str, error: str | None) -> str:
    try:
        value = float(text)
    except ValueError:
        return html.escape(text)
    shown = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
    return f"{shown} ± {float(error):.2g}" if error else shown


def write_page(folder: Path, title: str, introduction: str, command: str, sections: Sequence[Section]) -> Path:
    """index.html and the PNGs, from the CSVs of the folder.

    Args:
        sections: tables in words, before the figures and those of the CSVs.
    """
    pictures = "".join(f'<img src="{name}" alt="{html.escape(words)}">' for name, words in figures(folder))
    first, *others = map(_section, sections)
    tables = "".join(
        f'<details><summary>{html.escape(words)} (<a href="{name}">{name}</a>)</summary>{_table(read(folder / name))}'
        "</details>"
        for name, words in (
            ("table.csv", "Every placement"),
            ("comparison.csv", "Searched minus even and median random placements, with 95 % intervals"),
            ("ranks.csv", "What the scores of a search say of the rest, with 95 % intervals"),
            ("curve.csv", "What more tokens of finalising bring"),
            ("suite.csv", "Every benchmark"),
        )
    )
    path = folder / "index.html"
    write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(introduction)}</p><pre>{html.escape(command)}</pre>"
        f'<div class="figures">{pictures}</div>{first}{"".join(others)}<h2>All numbers</h2>{tables}</html>\n',
    )
    return path
