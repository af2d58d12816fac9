"""The tables that a reader wants of a comparison, in words and formatted cells: for the page and for summary.md."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nasbench.core.sizes import format_size
from nasbench.evaluation.scores import Z95
from nasbench.report.comparison import MEDIAN, Comparison, column
from nasbench.search.compared import BEST, FINAL, SUPERNET, Compared, composition
from nasbench.search.trials import TEACHER, UNIFORM
from nasbench.spaces.placement import Placement

NAMES = {TEACHER: "the model itself", UNIFORM: "evenly spread", MEDIAN: MEDIAN, "kl": "KL", "suite": "benchmarks"}
AGREEMENT = "agreement@128"


@dataclass(frozen=True)
class Cell:
    """A formatted cell.

    Attributes:
        sure: the whole interval is on the better side; shown in bold.
        partly: rests on a few items of each benchmark; shown in italics.
        estimated: rests on estimated rows; shown hatched, and marked ~ in text.
        placement: the layers, shown as a strip above the text.
        code: a command or a file.
    """

    text: str
    sure: bool = False
    partly: bool = False
    estimated: bool = False
    placement: Placement = ()
    code: bool = False

    @property
    def plain(self) -> str:
        return f"~{self.text}" if self.estimated and self.text else self.text


@dataclass(frozen=True)
class Section:
    """A table with its title and the words before it.

    Attributes:
        name: of its files, NAME.csv and NAME.md.
        lines: how many are shown at once; the page folds the others away.
    """

    name: str
    title: str
    words: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    lines: int = 40

    @property
    def csv(self) -> str:
        frame = pd.DataFrame([[cell.plain for cell in row] for row in self.rows], columns=list(self.head))
        return frame.to_csv(index=False)


def sections(found: Comparison) -> list[Section]:
    """Those that have rows."""
    made = [_placements(found), _gaps(found), _ranks(found), _curve(found), _speeds(found)]
    return [section for section in made if section.rows]


def markdown(parts: Iterable[Section]) -> str:
    """The sections as Markdown, for the README of a committed report."""
    text = []
    for part in parts:
        lines = [part.head, ["---"] * len(part.head), *([_marked(cell) for cell in row] for row in part.rows)]
        words = f"{part.words}\n\n" if part.words else ""
        text.append(f"## {part.title}\n\n{words}" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(text)


def _marked(cell: Cell) -> str:
    text = cell.plain.replace("|", "\\|")
    if not text:
        return ""
    return f"**{text}**" if cell.sure else f"*{text}*" if cell.partly else f"`{text}`" if cell.code else text


def name_of(found: Comparison, row: Compared) -> str:
    """What a row is called; "" for one that a page has no room for: most random placements, and single-kind ones."""
    if row.weights.startswith(FINAL):
        variant = row.weights.partition(":")[2]
        return "finalised" + (f", {variant}" if variant else "")
    if row.fill != BEST:
        return ""
    if row.method.startswith("random-"):
        return MEDIAN if row == found.median_random(row.k) else ""
    return NAMES.get(row.method, row.method)


def best_searched(found: Comparison) -> list[tuple[Compared, Compared | None]]:
    """The model, then the searched placement of each K with the least divergence; each beside the even spread."""
    pairs: list[tuple[Compared, Compared | None]] = [(found.teacher, None)] if found.teacher else []
    rows = [row for row in found.rows if row.chosen and row.weights == SUPERNET]
    for count in dict.fromkeys(row.k for row in rows):
        even = next((row for row in rows if row.k == count and row.method == UNIFORM), None)
        mine = [row for row in rows if row.k == count and row.method != UNIFORM] or ([even] if even else [])
        known = [(score.value, index) for index, row in enumerate(mine) if (score := found.scores(row, "kl"))]
        pairs.append((mine[min(known)[1] if known else 0], even))
    return pairs


def _task_name(task: str) -> str:
    name, _, rest = task.partition("@")
    return f"{name} {rest.partition(':')[0]}" if rest else NAMES.get(task, task)


def _interval(value: float, error: float, percent: bool = False) -> str:
    """`0.0712 ± 0.0031`, half the width of the 95 % interval behind the value; "" for what was not measured."""
    if math.isnan(value):
        return ""
    scale, digits, unit = (100, 1, " %") if percent else (1, 4, "")
    width = "" if math.isnan(error) else f" ± {scale * Z95 * error:.{digits}f}"
    return f"{scale * value:.{digits}f}{width}{unit}"


def _placements(found: Comparison) -> Section:
    retrieval, context = found.tasks("retrieval"), next(iter(found.contexts), None)
    items = max((score.items for row in found.rows if (score := found.suite(row))), default=0)
    shown = []
    for row, cells in zip(found.rows, found.table().to_dict("records"), strict=True):
        if not (name := name_of(found, row)):
            continue
        line = [Cell(str(row.k)), Cell(name), Cell(_cell(cells, "loss_above_teacher")), Cell(_cell(cells, "kl"))]
        if found.benchmarks:
            line.append(Cell(_cell(cells, "suite_kept", percent=True), partly=cells["suite_items"] != items))
        for task in retrieval:
            ours, theirs = found.scores(row, task), found.scores(found.teacher, task)
            line.append(Cell(f"{ours.value / theirs.value:.0%}" if ours and theirs and theirs.value else ""))
        if AGREEMENT in found.tasks("agreement"):
            agreed = found.scores(row, AGREEMENT)
            line.append(Cell(f"{agreed.value:.1%}" if agreed else ""))
        if context is not None:
            speed, full = found.speed(row, context)[0], found.speed(found.teacher or row, context)[0]
            gain = f" ({speed / full:.2f}x)" if full else ""
            line.append(Cell("" if math.isnan(speed) else f"{speed:,.0f}{gain}"))
        shown.append(line)
    head = ["K", "placement", "loss", "KL", *(["suite kept"] if found.benchmarks else [])]
    head += [_task_name(task) for task in retrieval]
    head += ["agreement"] if AGREEMENT in found.tasks("agreement") else []
    head += [f"tokens/s at {format_size(context)}"] if context is not None else []
    words = (
        "± is half of a 95 % interval. Loss: nats a token above the model's own, on text that no search saw. Suite and "
        "retrieval: share of the model's score on the same items; the suite's above chance. Agreement: share of 128 "
        "tokens of the model's own text that are the placement's first choice. Italics: a few items of each benchmark."
    )
    return Section("compared", "Placements compared", words, head, shown)


def _cell(cells: Mapping[Hashable, Any], name: str, percent: bool = False) -> str:
    return _interval(cells[name], cells[f"{name}_se"], percent)


def _gaps(found: Comparison) -> Section:
    task = found.common_retrieval()
    shown = {"kl": -1, "loss": -1, **({column(task): 1} if task else {}), **({"suite": 1} if found.benchmarks else {})}
    items = sum(s.n for name in found.benchmarks if (s := found.scores(found.teacher, f"suite:{name}")))
    rows = []
    for cells in found.gaps().to_dict("records"):
        line = [Cell(str(cells["k"])), *(Cell(NAMES.get(cells[key], cells[key])) for key in ("searched", "against"))]
        for name, better in shown.items():
            value, low, high = cells[name], cells[f"{name}_low"], cells[f"{name}_high"]
            scale, digits = (1, 4) if better < 0 else (100, 1)
            text = " to ".join(f"{scale * bound:+z.{digits}f}" for bound in (low, high))
            text = f"{scale * value:+z.{digits}f} ({text})"
            if name == "suite" and cells["suite_items"] != items:
                text += f", {cells['suite_items']} items"
            sure = high < 0 if better < 0 else low > 0
            line.append(Cell("" if math.isnan(value) else text, sure=sure))
        rows.append(line)
    titles = {"kl": "KL", "loss": "loss", "suite": "benchmarks", **({column(task): _task_name(task)} if task else {})}
    return Section(
        "searched-minus-others",
        "Searched minus others, over the same rows of text and the same questions",
        "KL and loss: nats a token, less is better. Retrieval and benchmarks: points of accuracy, more is better. "
        "Bold: the whole 95 % interval is better.",
        ["K", "search", "against", *(titles[name] for name in shown)],
        rows,
    )


def _ranks(found: Comparison) -> Section:
    """One row for each score and kind of pairs."""
    names = {column(task): _task_name(task) for task in found.tasks("retrieval", "agreement")}
    names = {"suite": "benchmarks", **names}
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for cells in found.ranks().to_dict("records"):
        text = f"{cells['tau']:z.2f} ({cells['low']:z.2f} to {cells['high']:z.2f})"
        rows.setdefault((cells["score"], cells["pairs"]), {})[cells["measure"]] = Cell(text, sure=cells["low"] > 0)
    shown = [name for name in names if any(name in line for line in rows.values())]
    return Section(
        "rank-correlation",
        "What loss and KL say about the slower measures",
        "Kendall's tau between placements before finalising: 1 is the same ranking, 0 is chance. Equal K: only pairs "
        "with as many full-attention layers, among which a search chooses. Intervals over placements drawn anew. Bold: "
        "the whole interval is above 0.",
        ["score", "pairs", *(names[name] for name in shown)],
        [
            [Cell(NAMES.get(score, score)), Cell(pairs), *(line.get(name, Cell("")) for name in shown)]
            for (score, pairs), line in rows.items()
        ],
    )


def _curve(found: Comparison) -> Section:
    rows = [
        [Cell(str(row["k"])), Cell(str(row["weights"]).partition(":")[2] or "as the recipe says"),
         Cell(f"{row['tokens'] / 1e6:,.3g}"), Cell(_cell(row, "loss_above_teacher")), Cell(_cell(row, "kl")),
         Cell(_cell(row, "retrieval", percent=True))]
        for row in found.curve().to_dict("records")
    ]  # fmt: skip
    head = ["K", "variant", "million tokens", "loss", "KL", "retrieval"]
    words = "Loss: nats a token above the model's."
    return Section("finalising", "What more tokens of finalising bring", words, head, rows)


def _speeds(found: Comparison) -> Section:
    """One row for each number of layers of each kind, the most full attention first."""
    rows: dict[str, list[Cell]] = {}
    for row in found.rows if found.contexts else []:
        layers = composition(row.placement)
        speeds = [found.speed(row, context) for context in found.contexts]
        cells = [
            text
            for tok_s, cache in speeds
            for text in ("" if math.isnan(tok_s) else f"{tok_s:,.0f}", f"{cache / 2**30:.3f}")
        ]
        rows.setdefault(layers, [Cell(layers), *map(Cell, cells)])
    longest = found.shape.max_context
    told = "; ".join(
        f"{format_size(context)}: {batch} sequences at once"
        + (", the model's shape with a longer cache than it was trained for" if context > longest else "")
        for context, batch in found.contexts.items()
    )
    names = [format_size(context) for context in found.contexts]
    head = ["layers", *(f"{what} {at}" for at in names for what in ("tokens/s at", "cache, GiB, at"))]
    words = f"Measured end to end; the order of the layers does not matter. {told}."
    return Section("measured-speeds", "Speed and cache", words, head, list(rows.values()))
