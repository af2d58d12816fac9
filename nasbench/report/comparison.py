"""Placements compared item by item, from a run's files: what the report's tables and figures of accuracy rest on.

Every table is a pandas DataFrame. NaN stands for what was not measured. Columns that end in `_se` are standard errors
over items, `_low` and `_high` the ends of 95 % intervals.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from nasbench.core.sizes import format_size, parse_size
from nasbench.evaluation.ranks import kendall
from nasbench.evaluation.scores import Gap, Scores, ScoreStore, difference, mean_and_stderr
from nasbench.evaluation.suite import evenly
from nasbench.model.shapes import ModelSpec
from nasbench.runs import Run
from nasbench.search.compared import (
    BEST,
    FINAL,
    SUPERNET,
    Benchmark,
    Compared,
    compared,
    composition,
    read_benchmarks,
)
from nasbench.search.trials import DRAWN, TEACHER, UNIFORM, read_trials
from nasbench.search.validation import ValidationRow, read_validation
from nasbench.supernet.budget import final_history
from nasbench.supernet.finalize import final_folder, final_version

MEDIAN = "median random"
SCORES = ("loss", "kl")
FEWEST = 5
"""Placements whose order says something."""
PLAIN = ".plain"
"""Ends the task of multiple choice that is scored without its normalisation by length."""


@dataclass(frozen=True)
class SuiteScore:
    """All benchmarks of a placement beside the teacher's on the same items.

    Attributes:
        average: mean accuracy over the benchmarks.
        kept: share of the teacher's average above chance.
        items: in all.
    """

    average: float
    average_se: float
    kept: float
    kept_se: float
    items: int


def column(task: str) -> str:
    """A task's column: `retrieval@2k:200` -> retrieval_2k_n200."""
    return task.replace(":", "_n").replace("@", "_").replace(".", "_")


def length_of(task: str) -> int:
    """The tokens in a task's name: `retrieval@2k:100` -> 2048, 0 where there are none."""
    text = task.partition("@")[2].partition(":")[0].partition(".")[0]
    return parse_size(text) if text else 0


class Comparison:
    """The compared placements of a run and what was measured of them; empty where nothing was searched."""

    def __init__(self, run: Run, shape: ModelSpec, store: ScoreStore | None = None) -> None:
        self.run, self.shape = run, shape
        store = store or ScoreStore(run.scores)
        self.trials = trials = read_trials(run.trials, store)
        self.rows = compared(run, trials) if trials else []
        self._supernet = trials[-1].supernet if trials else ""
        self.benchmarks: dict[str, Benchmark] = read_benchmarks(run)
        self._scores: dict[tuple[str, str, str], Scores] = {}
        self._searched: dict[tuple[str, str, str], Scores] = {}
        for key, found in store.find().items():
            # What searches see is another text; of each, the most samples count, of those the newest.
            table = self._searched if key.settings.startswith("search") else self._scores
            known = table.get((key.weights, key.placement, key.task))
            if known is None or found.n >= known.n:
                table[key.weights, key.placement, key.task] = found
        limits = [length_of(task) for _, _, task in self._scores if task.startswith("suite@")]
        self.few = max(limits, default=0)

    @cached_property
    def teacher(self) -> Compared | None:
        return next((row for row in self.rows if row.method == TEACHER), None)

    @property
    def measured(self) -> bool:
        """Whether any placement beside the model was scored on the test split."""
        return any(row.method != TEACHER and self.scores(row, "kl") is not None for row in self.rows)

    @cached_property
    def _versions(self) -> dict[Compared, str]:
        """Of the weights that each row stands for."""
        found = dict.fromkeys(self.rows, self._supernet)
        for row in (row for row in self.rows if row.weights.startswith(FINAL)):
            folder = final_folder(self.run, row.placement, row.weights.partition(":")[2])
            history = final_history(folder)
            found[row] = next(reversed(history)) if history else final_version(folder)
        return found

    def scores(self, row: Compared | None, task: str) -> Scores | None:
        """What was measured of a placement; a few items of a benchmark also out of all of them."""
        if row is None:
            return None
        weights, name = self._versions[row], task.partition(":")[2]
        found = self._scores.get((weights, row.text, task))
        whole = self._scores.get((weights, row.text, f"suite:{name}")) if task.startswith("suite@") else None
        if found is None and whole is not None and whole.samples is not None:
            samples = whole.samples[evenly(length_of(task), len(whole.samples))]
            return Scores.of(samples, whole.metric, whole.higher_is_better)
        return found

    def above_teacher(self, text: str, task: str = "loss") -> Gap:
        """A placement with the supernet's weights minus the model itself, item by item, on text that no search saw."""
        return difference(self._scores.get((self._supernet, text, task)), self.scores(self.teacher, task))

    def gap(self, row: Compared, task: str = "loss") -> Gap:
        """A row minus the model itself, item by item."""
        return difference(self.scores(row, task), self.scores(self.teacher, task))

    def while_searching(self, text: str) -> dict[str, float]:
        """Every task's cost (nats, or 1 - accuracy) of a placement above the model's, on the text that searches see."""
        if not self.teacher:
            return {}
        whole = {task: self._searched.get((self._supernet, self.teacher.text, task)) for task in self._search_tasks}
        mine = {task: self._searched.get((self._supernet, text, task)) for task in self._search_tasks}
        return {task: found.cost - own.cost for task, own in whole.items() if own and (found := mine[task])}

    @cached_property
    def _search_tasks(self) -> list[str]:
        return sorted({task for _, _, task in self._searched})

    def tasks(self, *kinds: str) -> list[str]:
        """The tasks of these kinds that any placement has, the shorter lengths first."""
        found = {task for _, _, task in self._scores if task.partition("@")[0] in kinds}
        return sorted(found, key=lambda task: (kinds.index(task.partition("@")[0]), length_of(task), task))

    def pairs(self, row: Compared, other: Compared | None, few: bool) -> list[tuple[Scores, Scores]] | None:
        """Of every benchmark the scores of two placements on the same items; None where one is missing."""
        if not self.benchmarks or other is None or (few and not self.few):
            return None
        found = []
        for name in self.benchmarks:
            task = f"suite@{self.few}:{name}" if few else f"suite:{name}"
            ours, theirs = self.scores(row, task), self.scores(other, task)
            if ours is None or theirs is None or ours.n != theirs.n:
                return None
            found.append((ours, theirs))
        return found

    def suite(self, row: Compared, few: bool | None = None) -> SuiteScore | None:
        """Over all benchmarks: of all items, of a few of each, or (None) of all where they were asked.

        The error of `kept`, a ratio of averages s / t above chance: that of s - kept x t over the same items.
        """
        if few is None:
            return self.suite(row, False) or self.suite(row, True)
        pairs = self.pairs(row, self.teacher, few)
        if pairs is None:
            return None
        chances = [each.chance for each in self.benchmarks.values()]
        above, whole = (
            float(np.mean([pair[side].value - floor for pair, floor in zip(pairs, chances, strict=True)]))
            for side in (0, 1)
        )
        kept = above / whole if whole > 0 else math.nan
        spread = [mean_and_stderr(_samples(ours) - kept * _samples(theirs))[1] for ours, theirs in pairs]
        return SuiteScore(
            average=float(np.mean([ours.value for ours, _ in pairs])),
            average_se=math.sqrt(sum(ours.stderr**2 for ours, _ in pairs)) / len(pairs),
            kept=kept,
            kept_se=math.sqrt(sum(error**2 for error in spread)) / len(pairs) / whole if whole > 0 else math.nan,
            items=sum(ours.n for ours, _ in pairs),
        )

    def suite_gap(self, row: Compared, other: Compared) -> Gap:
        """Mean accuracy over the benchmarks minus another placement's, over all items that both were asked."""
        for few in (False, True):
            pairs = self.pairs(row, other, few)
            if pairs is not None:
                gaps = [difference(ours, theirs) for ours, theirs in pairs]
                error = math.sqrt(sum(gap.stderr**2 for gap in gaps)) / len(gaps)
                return Gap(float(np.mean([gap.mean for gap in gaps])), error, sum(gap.n for gap in gaps))
        return Gap(math.nan, math.nan, 0)

    def median_random(self, count: int) -> Compared | None:
        """The random placement of K layers that is in the middle by its divergence."""
        drawn = [row for row in self.rows if row.k == count and row.method.startswith(DRAWN)]
        known = [(found.value, index) for index, row in enumerate(drawn) if (found := self.scores(row, "kl"))]
        return drawn[sorted(known)[len(known) // 2][1]] if known else None

    @cached_property
    def speeds(self) -> dict[tuple[str, int], ValidationRow]:
        """Measured decode speeds by composition and context."""
        rows = read_validation(self.run.validation)
        return {(composition(row.layers), row.context): row for row in rows}

    @cached_property
    def contexts(self) -> dict[int, int]:
        """Contexts that speeds were measured at, each with its batch."""
        return {row.context: row.batch for row in sorted(self.speeds.values(), key=lambda row: row.context)}

    def speed(self, row: Compared, context: int) -> tuple[float, int]:
        """(measured decode tokens/s, NaN if unknown; cache bytes by formula) at a context and its batch."""
        known = self.speeds.get((composition(row.placement), context))
        batch = self.contexts[context]
        cache = sum(mixer.cache_bytes(batch, context) for mixer in self.shape.mixers(row.placement))
        return (known.measured_tok_s if known else math.nan), cache

    def table(self) -> pd.DataFrame:
        """Every placement: losses, benchmarks, retrieval, agreement, speed."""
        return pd.DataFrame([self._table_row(row) for row in self.rows])

    def _table_row(self, row: Compared) -> dict[str, Any]:
        gap, suite = self.gap(row), self.suite(row)
        cells: dict[str, Any] = {"k": row.k, "method": row.method, "fill": row.fill, "weights": row.weights}
        cells |= {"placement": row.text, **self._mean(row, "loss")}
        cells |= {"loss_above_teacher": gap.mean, "loss_above_teacher_se": gap.stderr, **self._mean(row, "kl")}
        cells |= {f"suite_{name}": getattr(suite, name, math.nan) for name in SuiteScore.__dataclass_fields__}
        for task in self.tasks("retrieval", "agreement"):
            cells |= self._mean(row, task)
        for context in self.contexts:
            at, (tok_s, cache) = format_size(context), self.speed(row, context)
            cells |= {f"decode_tok_s_{at}": tok_s, f"cache_bytes_{at}": cache}
        return cells

    def _mean(self, row: Compared, task: str) -> dict[str, float]:
        return _mean(column(task), self.scores(row, task))

    def suites(self) -> pd.DataFrame:
        """Every benchmark of every placement, beside the teacher's accuracy on the same items."""
        rows = []
        for row in self.rows:
            for name, benchmark in self.benchmarks.items():
                for task in (f"suite:{name}", f"suite:{name}{PLAIN}"):
                    if (found := self.scores(row, task)) is None:
                        continue
                    gap = difference(found, self.scores(self.teacher, task))
                    rows.append(
                        {"placement": row.text, "weights": row.weights, "benchmark": name,
                         "scoring": "plain" if task.endswith(PLAIN) else "standard", "n": found.n,
                         "accuracy": found.value, "se": found.stderr, "above_teacher": gap.mean,
                         "above_teacher_se": gap.stderr, "chance": benchmark.chance}
                    )  # fmt: skip
        return pd.DataFrame(rows).drop_duplicates() if rows else pd.DataFrame()

    def gaps(self) -> pd.DataFrame:
        """Searched placements minus the evenly spread and the median random one of the same K and replacements, item by
        item. Less loss and KL, and more accuracy, mean that the search is better."""
        rows = []
        best = [row for row in self.rows if row.fill == BEST and row.weights == SUPERNET]
        for count in sorted({row.k for row in best}):
            mine = {row.method: row for row in best if row.k == count}
            others = {UNIFORM: mine.get(UNIFORM), MEDIAN: self.median_random(count)}
            for method, row in mine.items():
                for name, other in others.items():
                    if method == UNIFORM or method.startswith(DRAWN) or other is None:
                        continue
                    cells: dict[str, Any] = {"k": count, "searched": method, "against": name}
                    for task in (*SCORES, *self.tasks("retrieval")):
                        cells |= _gap(column(task), difference(self.scores(row, task), self.scores(other, task)))
                    gap = self.suite_gap(row, other)
                    rows.append({**cells, **_gap("suite", gap), "suite_items": gap.n})
        return pd.DataFrame(rows)

    def ranks(self) -> pd.DataFrame:
        """Kendall's tau-b between loss or KL and a measure that takes longer, positive where less loss goes with more
        accuracy, over placements with the supernet's weights that were asked all items of the measure.

        `pairs`: all, or those of equal K, among which a search chooses. `low`, `high`: over placements drawn anew.
        """
        known = {row.text: row for row in self.rows if row.weights == SUPERNET and row.fill == BEST}
        slow = [task for task in self.tasks("retrieval", "agreement") if not task.endswith(".prefix")]
        slow = [*(["suite"] if self.benchmarks else []), *slow]
        values = {name: np.array([self._value(row, name) for row in known.values()]) for name in (*SCORES, *slow)}
        counts = np.array([row.k for row in known.values()])
        rows = []
        for score, pairs, name in itertools.product(SCORES, ("all", "equal K"), slow):
            there = ~np.isnan(values[score]) & ~np.isnan(values[name])
            groups = counts if pairs == "equal K" else np.zeros(len(counts))
            # A placement that is alone in its group is in no pair.
            there &= np.array([(groups[there] == group).sum() > 1 for group in groups], dtype=bool)
            if there.sum() < FEWEST:
                continue
            tau, low, high = kendall(-values[score][there], values[name][there], groups[there])
            if not math.isnan(tau):
                cells = {"score": score, "pairs": pairs, "measure": column(name), "placements": int(there.sum())}
                rows.append({**cells, "tau": tau, "low": low, "high": high})
        return pd.DataFrame(rows)

    def _value(self, row: Compared, name: str) -> float:
        """Mean of a measure; NaN where it was not measured."""
        if name == "suite":
            return getattr(self.suite(row, False), "average", math.nan)
        return getattr(self.scores(row, name), "value", math.nan)

    def curve(self) -> pd.DataFrame:
        """Loss, KL and retrieval of finalised placements after every number of tokens at which they were measured."""
        rows: list[dict[str, Any]] = []
        task, teacher = self.common_retrieval(), self.scores(self.teacher, "loss")
        for row in (row for row in self.rows if row.weights.startswith(FINAL)):
            folder = final_folder(self.run, row.placement, row.weights.partition(":")[2])
            for version, tokens in {self._supernet: 0, **final_history(folder)}.items():
                loss, kl, found = (self._scores.get((version, row.text, name)) for name in (*SCORES, task))
                if kl is None:
                    continue
                gap = difference(loss, teacher)
                cells = {"k": row.k, "placement": row.text, "weights": row.weights, "tokens": tokens}
                cells |= {"loss_above_teacher": gap.mean, "loss_above_teacher_se": gap.stderr}
                rows.append(cells | _mean("kl", kl) | _mean("retrieval", found))
        return pd.DataFrame(rows).sort_values(["k", "weights", "tokens"]) if rows else pd.DataFrame()

    def common_retrieval(self) -> str:
        """Retrieval of a length that every placement was asked, of several the middle one; "" where there is none."""
        tasks = self.tasks("retrieval")
        found = [task for task in tasks if all(self.scores(row, task) is not None for row in self.rows)]
        return found[len(found) // 2] if found else ""


def _samples(scores: Scores) -> np.ndarray:
    return scores.samples if scores.samples is not None else np.full(scores.n, scores.value)


def _mean(name: str, found: Scores | None) -> dict[str, float]:
    return {name: found.value if found else math.nan, f"{name}_se": found.stderr if found else math.nan}


def _gap(name: str, gap: Gap) -> dict[str, float]:
    return {name: gap.mean, f"{name}_low": gap.low, f"{name}_high": gap.high}


def tables(found: Comparison) -> dict[str, pd.DataFrame]:
    """Every table by the name of its CSV file; those without rows are left out."""
    named = {"table": found.table(), "comparison": found.gaps(), "ranks": found.ranks(), "curve": found.curve()}
    return {name: table for name, table in {**named, "suite": found.suites()}.items() if len(table)}
