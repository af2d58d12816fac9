"""The tables of a reproduction, computed from items.jsonl, speeds.csv and the plan; no weights are needed.

table.csv        every placement: losses, suite, retrieval, agreement, speed
suite.csv        every benchmark of every placement
comparison.csv   for every K, the searched placement against the even one and the median random one
ranks.csv        what the scores of a search say of the rest (nasbench/reproduce/ranks.py)
curve.csv        what more tokens of finalising bring
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nasbench.core.files import atomic_path
from nasbench.core.sizes import format_size, parse_size
from nasbench.evaluation.suite import chance, read_items
from nasbench.reproduce.items import Items, Subject, difference, mean_and_error, subject_of
from nasbench.reproduce.recipe import Plan
from nasbench.reproduce.speed import Speeds
from nasbench.search.trials import TEACHER, UNIFORM

Cells = dict[str, object]
Z95 = 1.96


@dataclass(frozen=True)
class Facts:
    """What the tables are computed from.

    Attributes:
        chances: of every benchmark, by the name of its file.
    """

    plan: Plan
    items: Items
    speeds: Speeds
    chances: dict[str, float]
    quick_items: int

    @cached_property
    def teacher(self) -> Subject | None:
        row = next((row for row in self.plan.candidates if row.method == TEACHER), None)
        return None if row is None else subject_of(row)


def suite_chances(files: Sequence[Path]) -> dict[str, float]:
    """What guessing scores in each benchmark."""
    return {path.stem: chance(read_items(path)) for path in files}


@dataclass(frozen=True)
class SuiteScore:
    """The suite of a placement beside the teacher's on the same items.

    Attributes:
        average: mean accuracy over the benchmarks; kept: what is kept of the teacher's average above chance.
        items: in all.
    """

    average: float
    average_se: float
    kept: float
    kept_se: float
    items: int


def suite_score(facts: Facts, subject: Subject, limit: int = 0) -> SuiteScore | None:
    """Over all benchmarks, `limit` items of each or all; None where one was not measured of the placement or of the
    teacher.

    The ratio's error by its first derivatives: of s - r t over the same items, with s and t the averages above chance.
    """
    pairs = _pairs(facts, subject, facts.teacher, limit)
    if pairs is None:
        return None
    floors = list(facts.chances.values())
    above = float(np.mean([ours.mean() - floor for (ours, _), floor in zip(pairs, floors, strict=True)]))
    whole = float(np.mean([theirs.mean() - floor for (_, theirs), floor in zip(pairs, floors, strict=True)]))
    kept = above / whole if whole > 0 else math.nan
    spread = [np.var(ours - kept * theirs, ddof=1) / len(ours) if len(ours) > 1 else math.nan for ours, theirs in pairs]
    errors = [mean_and_error(ours)[1] for ours, _ in pairs]
    count = len(pairs)
    return SuiteScore(
        average=float(np.mean([ours.mean() for ours, _ in pairs])),
        average_se=math.sqrt(sum(error**2 for error in errors)) / count,
        kept=kept,
        kept_se=math.sqrt(sum(spread)) / count / whole if whole > 0 else math.nan,
        items=sum(len(ours) for ours, _ in pairs),
    )


def _pairs(
    facts: Facts, subject: Subject, other: Subject | None, limit: int
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Of every benchmark the values of two subjects on the same items; None where one is missing."""
    if not facts.chances or other is None:
        return None
    pairs = []
    for name in facts.chances:
        ours, theirs = (
            facts.items.some(each, name, limit) if limit else facts.items.get(each, name) for each in (subject, other)
        )
        if ours is None or theirs is None or len(ours) != len(theirs):
            return None
        pairs.append((ours, theirs))
    return pairs


def best_suite_score(facts: Facts, subject: Subject) -> SuiteScore | None:
    """Of all items where they were asked, else of the few that every placement is asked."""
    return suite_score(facts, subject) or suite_score(facts, subject, facts.quick_items)


def suite_difference(facts: Facts, subject: Subject, other: Subject) -> tuple[float, float, int]:
    """Mean accuracy over the benchmarks minus another placement's, its standard error, and over how many items: all
    that both were asked. NaN, NaN and 0 where they share none."""
    for limit in (0, facts.quick_items):
        pairs = _pairs(facts, subject, other, limit)
        if pairs is not None:
            gaps = [difference(ours, theirs) for ours, theirs in pairs]
            error = math.sqrt(sum(se**2 for _, se in gaps)) / len(gaps)
            return float(np.mean([gap for gap, _ in gaps])), error, sum(len(ours) for ours, _ in pairs)
    return math.nan, math.nan, 0


def table_rows(facts: Facts) -> list[Cells]:
    """table.csv. Cells of what was not measured are empty."""
    rows: list[Cells] = []
    for candidate in sorted(facts.plan.candidates, key=lambda row: (-row.k, row.weights != TEACHER)):
        named = subject_of(candidate)
        loss, kl = (facts.items.get(named, name) for name in ("loss", "kl"))
        teacher = None if facts.teacher is None else facts.items.get(facts.teacher, "loss")
        cells: Cells = {
            "k": candidate.k, "method": candidate.method, "fill": candidate.fill, "weights": candidate.weights,
            "placement": named.placement,
            "loss": mean_and_error(loss)[0], "loss_se": mean_and_error(loss)[1],
            "loss_above_teacher": difference(loss, teacher)[0], "loss_above_teacher_se": difference(loss, teacher)[1],
            "kl": mean_and_error(kl)[0], "kl_se": mean_and_error(kl)[1],
        }  # fmt: skip
        score = best_suite_score(facts, named)
        for name in ("average", "average_se", "kept", "kept_se", "items"):
            cells[f"suite_{name}"] = math.nan if score is None else getattr(score, name)
        for measure in measures(facts.items, ("retrieval", "agreement")):
            name = column(measure)
            cells[name], cells[f"{name}_se"] = mean_and_error(facts.items.get(named, measure))
        for context in facts.speeds.batches:
            speed, at = facts.speeds.of(candidate.placement, context), format_size(context)
            cells[f"decode_tok_s_{at}"] = math.nan if speed is None else speed.decode_tok_s
            cells[f"speed_source_{at}"] = "" if speed is None else speed.source
            cells[f"cache_bytes_{at}"] = "" if speed is None else speed.cache_bytes
        rows.append(cells)
    return rows


def measures(items: Items, kinds: Sequence[str]) -> list[str]:
    """Measures of these kinds that any placement has, the shorter lengths first."""
    found = {measure for _, measure in items.values if measure.partition("@")[0] in kinds}
    return sorted(found, key=lambda name: (kinds.index(name.partition("@")[0]), length_of(name), name))


def length_of(measure: str) -> int:
    """The tokens in a measure's name: `retrieval@2k:100` -> 2048, 0 where there are none."""
    text = measure.partition("@")[2].partition(":")[0].partition(".")[0]
    return parse_size(text) if text else 0


def suite_rows(facts: Facts) -> list[Cells]:
    """suite.csv: accuracy of every benchmark, and beside the teacher's on the same items."""
    rows: list[Cells] = []
    for (subject, measure), values in sorted(
        facts.items.values.items(), key=lambda item: (*vars(item[0][0]).values(), item[0][1])
    ):
        stem = measure.partition("@")[0].partition(".")[0]
        if stem not in facts.chances:
            continue
        theirs = None if facts.teacher is None else facts.items.get(facts.teacher, measure)
        accuracy, error = mean_and_error(values)
        gap, gap_error = difference(values, theirs)
        rows.append(
            {"placement": subject.placement, "weights": subject.weights, "benchmark": stem,
             "scoring": "plain" if measure.endswith(".plain") else "standard", "n": len(values),
             "accuracy": accuracy, "se": error, "above_teacher": gap, "above_teacher_se": gap_error,
             "chance": facts.chances[stem]}
        )  # fmt: skip
    return rows


def comparison_rows(facts: Facts) -> list[Cells]:
    """comparison.csv: what was measured of searched placements minus that of the even and the median random one of the
    same K and fillers, over the same rows of text, questions and items, with 95 % intervals. Below zero in loss and KL,
    above it in retrieval and benchmarks the search is better, and beyond chance where the whole interval is there."""
    rows: list[Cells] = []
    best = [row for row in facts.plan.candidates if row.fill == "best" and row.weights == "supernet"]
    retrieval = measures(facts.items, ("retrieval",))
    for count in sorted({row.k for row in best}):
        mine = {row.method: subject_of(row) for row in best if row.k == count}
        others = {UNIFORM: mine.get(UNIFORM), "median random": median_random(facts, mine)}
        for method in ("beam", "kl-greedy", "recall"):
            for other, subject in others.items():
                if method not in mine or subject is None:
                    continue
                cells: Cells = {"k": count, "searched": method, "against": other}
                for measure in ("loss", "kl", *retrieval):
                    ours, theirs = (facts.items.get(each, measure) for each in (mine[method], subject))
                    cells |= _gap_cells(column(measure), *difference(ours, theirs))
                gap, error, asked = suite_difference(facts, mine[method], subject)
                rows.append({**cells, **_gap_cells("suite", gap, error), "suite_items": asked})
    return rows


def _gap_cells(name: str, gap: float, error: float) -> Cells:
    return {name: gap, f"{name}_low": gap - Z95 * error, f"{name}_high": gap + Z95 * error}


def column(measure: str) -> str:
    """A measure's column: `retrieval@2k:200` -> retrieval_2k_n200."""
    return measure.replace(":", "_n").replace("@", "_").replace(".", "_")


def median_random(facts: Facts, mine: dict[str, Subject]) -> Subject | None:
    """The random placement in the middle by its divergence, of the placements of one K by method."""
    drawn = [subject for method, subject in mine.items() if method.startswith("random-")]
    known = [(mean_and_error(facts.items.get(subject, "kl"))[0], subject) for subject in drawn]
    known = sorted(((kl, subject) for kl, subject in known if not math.isnan(kl)), key=lambda pair: pair[0])
    return known[len(known) // 2][1] if known else None


def write_cells(path: Path, rows: Sequence[Cells]) -> None:
    """A CSV with the columns of all rows; NaN is an empty cell."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column, "")) for column in columns] for row in rows)


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
