"""The tables of a reproduction that a reader wants: at the top of its page, and as summary.md, for the README of a
committed report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from nasbench.core.files import write_text
from nasbench.core.sizes import format_size
from nasbench.reproduce.items import mean_and_error, subject_of
from nasbench.reproduce.ranks import rank_rows
from nasbench.reproduce.recipe import Candidate
from nasbench.reproduce.speed import composition
from nasbench.reproduce.table import Z95, Cells, Facts, column, comparison_rows, measures, median_random, table_rows
from nasbench.search.objective import Speed
from nasbench.search.trials import TEACHER, UNIFORM

NAMES = {
    TEACHER: "the model itself",
    UNIFORM: "evenly spread",
    "beam": "beam",
    "kl-greedy": "KL-greedy",
    "recall": "with retrieval",
}
AGREEMENT = "agreement@128"
Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


@dataclass(frozen=True)
class Section:
    """A table with its title, which may be empty, and words before it. Cells in ** are bold, in * italic."""

    title: str
    words: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def sections(facts: Facts) -> list[Section]:
    """Placements by K, what a search is worth, what more tokens and other ways of finalising bring."""
    return [
        Section(
            "",
            "Intervals are 95 %. Losses in nats a token above the model's own, on held-out text; suite and retrieval "
            "as the share that is kept of the model's score (the suite's above chance), on the same items; agreement: "
            "of 128 tokens that the model writes, those that are the placement's first choice. In italics: of a few "
            "items of each benchmark, where not all were asked.",
            *_placements(facts),
        ),
        Section(
            "Searched minus others, over the same rows of text and the same questions",
            "KL and loss in nats a token, less is better; retrieval and benchmarks in points of accuracy, more is "
            "better; bold where all of the interval is better.",
            *_comparison(facts),
        ),
        Section(
            "What the scores of a search say of the rest",
            "Kendall's tau: of pairs of placements before finalising, the share that both put in the same order minus "
            "the share in the other order; 1 is the same ranking, 0 is chance. At equal K: pairs with as many layers "
            "of full attention, those that a search chooses among. Intervals over placements drawn anew; bold where "
            "all of it is above 0.",
            *_ranks(facts),
        ),
        Section("What more tokens and other ways of finalising bring", "", *_curve(facts)),
        Section(
            "Speed and cache",
            _speed_words(facts),
            *_speeds(facts),
        ),
    ]


def write_summary(folder: Path, facts: Facts, words: str, command: str) -> None:
    """summary.md of the sections, behind the command and words about the run."""
    parts = [f"    {command}\n\n{words}\n"]
    for section in sections(facts):
        parts += [f"## {section.title}\n"] if section.title else []
        parts += [f"{section.words}\n"] if section.words else []
        parts.append(_markdown(section.head, section.rows))
    write_text(folder / "summary.md", "\n".join(parts))


def _placements(facts: Facts) -> Table:
    candidates = sorted(facts.plan.candidates, key=lambda row: (-row.k, row.weights != TEACHER))
    rows = list(zip(candidates, table_rows(facts), strict=True))
    retrieval = measures(facts.items, ("retrieval",))
    teacher = next((cells for row, cells in rows if row.method == TEACHER), {})
    context = next(iter(facts.speeds.batches), None)
    shown = []
    for candidate, cells in rows:
        name = _name(facts, candidate)
        if name is None:
            continue
        line = [
            str(candidate.k), name, _interval(cells, "loss_above_teacher"), _interval(cells, "kl"),
            _interval(cells, "suite_kept", percent=True),
        ]  # fmt: skip
        if line[-1] and cells["suite_items"] != most_items(facts):
            line[-1] = f"*{line[-1]}*"
        for measure in retrieval:
            ours = facts.items.get(subject_of(candidate), measure)
            theirs = None if facts.teacher is None else facts.items.get(facts.teacher, measure)
            whole = 0.0 if theirs is None else float(theirs.mean())
            line.append("" if ours is None or not whole else f"{float(ours.mean()) / whole:.0%}")
        agreed = mean_and_error(facts.items.get(subject_of(candidate), AGREEMENT))[0]
        line.append("" if math.isnan(agreed) else f"{agreed:.1%}")
        if context is not None:
            speed, before = (_number(row, f"decode_tok_s_{format_size(context)}") for row in (cells, teacher))
            line.append("" if math.isnan(speed) else f"{speed:,.0f}" + (f" ({speed / before:.2f}x)" if before else ""))
        shown.append(line)
    head = ["K", "placement", "loss", "KL", "suite kept"]
    head += [_length_name(measure) for measure in retrieval]
    head += ["agreement"]
    head += [f"tokens/s at {format_size(context)}"] if context is not None else []
    return head, shown


def _name(facts: Facts, candidate: Candidate) -> str | None:
    """What a placement is called, None for one that the page has no room for."""
    if candidate.weights.startswith("final"):
        _, _, way = candidate.weights.partition(":")
        return "finalised" + (f", {way}" if way else "")
    if candidate.fill != "best":
        return None
    if candidate.method in NAMES:
        return NAMES[candidate.method]
    same = [row for row in facts.plan.candidates if row.k == candidate.k and row.weights == candidate.weights]
    middle = median_random(facts, {row.method: subject_of(row) for row in same if row.fill == "best"})
    return "median random" if middle == subject_of(candidate) else None


def _comparison(facts: Facts) -> Table:
    asked = compared(facts)
    shown = {"kl": ("KL", -1), "loss": ("loss", -1), **{column(m): (_length_name(m), 1) for m in asked}}
    if facts.chances:
        shown["suite"] = ("benchmarks", 1)
    rows = []
    for cells in comparison_rows(facts):
        line = [str(cells["k"]), NAMES[str(cells["searched"])], NAMES.get(str(cells["against"]), str(cells["against"]))]
        for name, (_, better) in shown.items():
            value, low, high = (_number(cells, f"{name}{end}") for end in ("", "_low", "_high"))
            if better < 0:
                text = f"{value:+z.4f} ({low:+z.4f} to {high:+z.4f})"
            else:
                text = f"{100 * value:+z.1f} ({100 * low:+z.1f} to {100 * high:+z.1f})"
            if name == "suite" and cells["suite_items"] != most_items(facts):
                text += f", {cells['suite_items']} items"
            sure = high < 0 if better < 0 else low > 0
            line.append("" if math.isnan(value) else f"**{text}**" if sure else text)
        rows.append(line)
    return ["K", "search", "against", *(title for title, _ in shown.values())], rows


def compared(facts: Facts) -> list[str]:
    """Retrieval of a length that every placement was asked, of several the middle one: comparison.csv has them all."""
    subjects = {subject_of(row) for row in facts.plan.candidates}
    found = measures(facts.items, ("retrieval",))
    found = [name for name in found if all(facts.items.get(each, name) is not None for each in subjects)]
    return found[len(found) // 2 :][:1]


def _ranks(facts: Facts) -> Table:
    """One row for each score and kind of pairs."""
    names = {"suite": "benchmarks", **{column(m): _length_name(m) for m in measures(facts.items, ("retrieval",))}}
    names[column(AGREEMENT)] = "agreement"
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for cells in rank_rows(facts):
        text = f"{cells['tau']:z.2f} ({cells['low']:z.2f} to {cells['high']:z.2f})"
        line = rows.setdefault((str(cells["score"]), str(cells["pairs"])), {})
        line[str(cells["measure"])] = f"**{text}**" if _number(cells, "low") > 0 else text
    shown = {name: title for name, title in names.items() if any(name in line for line in rows.values())}
    titles = {"loss": "loss", "kl": "KL"}
    return ["score", "pairs", *shown.values()], [
        [titles[score], pairs, *(line.get(name, "") for name in shown)] for (score, pairs), line in rows.items()
    ]


def most_items(facts: Facts) -> int:
    """Items of all benchmarks together."""
    if facts.teacher is None:
        return 0
    return sum(0 if (v := facts.items.get(facts.teacher, name)) is None else len(v) for name in facts.chances)


def _length_name(measure: str) -> str:
    return f"retrieval {measure.partition('@')[2].partition(':')[0]}"


def _curve(facts: Facts) -> Table:
    rows = [
        [
            str(row["k"]), str(row["weights"]).partition(":")[2] or "as the recipe says",
            f"{float(row['tokens']) / 1e6:,.3g}", _interval(row, "loss_above_teacher"), _interval(row, "kl"),
            _interval(row, "retrieval", percent=True),
        ]
        for row in facts.plan["curve"] or []
    ]  # fmt: skip
    return ["K", "way", "million tokens", "loss", "KL", "retrieval"], rows


def _speed_words(facts: Facts) -> str:
    longest = facts.speeds.shape.max_context
    told = [
        f"{format_size(context)}: {batch} sequences at once"
        + (", the model's shape with a longer cache than it was trained for" if context > longest else "")
        for context, batch in facts.speeds.batches.items()
    ]
    return (
        f"Of all placements with these layers, wherever they stand. {'; '.join(told)}. In italics what was not "
        "measured: the mean of the steps of models of one kind of layer."
    )


def _speeds(facts: Facts) -> Table:
    """One row for each number of layers of each kind, the most full attention first."""
    rows: dict[str, list[str]] = {}
    for candidate in sorted(facts.plan.candidates, key=lambda row: -row.k):
        layers = composition(candidate.placement)
        if layers in rows:
            continue
        found = [facts.speeds.of(candidate.placement, context) for context in facts.speeds.batches]
        rows[layers] = [layers, *chain.from_iterable(map(_speed_cells, found))]
    names = [format_size(context) for context in facts.speeds.batches]
    return ["layers", *(f"{what} {n}" for n in names for what in ("tokens/s at", "cache, GiB, at"))], list(
        rows.values()
    )


def _speed_cells(speed: Speed | None) -> list[str]:
    if speed is None:
        return ["", ""]
    text = f"{speed.decode_tok_s:,.0f}"
    return [text if speed.source == "measured" else f"*{text}*", f"{speed.cache_bytes / 2**30:.3f}"]


def _number(cells: Cells, name: str) -> float:
    value = cells.get(name, math.nan)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _interval(cells: Cells, name: str, percent: bool = False) -> str:
    """`0.0712 ± 0.0031`, half the width of the interval behind the value; nothing for what was not measured."""
    value, error = _number(cells, name), _number(cells, f"{name}_se")
    if math.isnan(value):
        return ""
    scale, digits, unit = (100, 1, " %") if percent else (1, 4, "")
    width = "" if math.isnan(error) else f" ± {scale * Z95 * error:.{digits}f}"
    return f"{scale * value:.{digits}f}{width}{unit}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) if len(lines) > 2 else "Nothing measured.\n"
