"""What is measured of every candidate of the table, the most telling first, as far as the seconds go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nasbench.evaluation.evaluator import Evaluator
from nasbench.evaluation.suite import Suite
from nasbench.evaluation.tasks import Task, parse_task
from nasbench.reproduce.items import Items, Subject, mean_and_error
from nasbench.reproduce.recipe import Candidate
from nasbench.reproduce.stages import SEARCHED, Bench
from nasbench.search.trials import TEACHER, UNIFORM
from nasbench.spaces.placement import format_placement
from nasbench.supernet.finalize import final_folder, use_final

GROUP = 8
"""Placements whose held-out loss is measured together: they share the layers they begin with."""


def subject(candidate: Candidate) -> Subject:
    return Subject(format_placement(candidate.placement), candidate.weights)


def suite_files(folder: Path | None) -> list[Path]:
    """The benchmarks of a folder."""
    return sorted(folder.glob("*.jsonl")) if folder is not None else []


def measure_name(task: Task, label: str) -> str:
    """What a measure is called in items.jsonl: a benchmark by its file's name, `@N` where N of its items were asked."""
    if not isinstance(task, Suite):
        return label
    limit = f"@{task.limit}" if task.limit else ""
    return task.path.stem + limit + label.removeprefix(task.label)


def tasks_of(bench: Bench, full: bool) -> list[Task]:
    """The tasks of a chosen placement, or of any."""
    recipe = bench.recipe
    limit = "" if full else f"@{recipe.quick_items}"
    lengths = recipe.retrieval if full else recipe.quick_retrieval
    texts = ["agreement@128", *(f"suite{limit}:{path}" for path in suite_files(recipe.suite))]
    texts += [f"retrieval@{n}:{recipe.retrieval_items}" for n in lengths if n <= bench.shape.max_context]
    return [parse_task(text) for text in texts]


def is_chosen(candidate: Candidate) -> bool:
    """Whether a candidate is asked everything: the model itself, finalised ones, and of each K the searched ones and
    the evenly spread one with the same fillers."""
    finished = candidate.weights.startswith("final") or candidate.method in (TEACHER, *SEARCHED)
    return finished or (candidate.method == UNIFORM and candidate.fill == "best")


def queue(bench: Bench) -> Iterator[tuple[Candidate, bool]]:
    """(candidate, whether it is asked everything) in the order of measuring: the model and what was finalised, what
    else was chosen, then all others briefly, and in the end those at length, too."""
    rows = bench.plan.candidates
    first = [row for row in rows if row.method == TEACHER or row.weights.startswith("final")]
    order = list(dict.fromkeys((*bench.recipe.finalized, *bench.recipe.counts)))
    main = sorted(
        (row for row in rows if is_chosen(row) and row not in first), key=lambda row: (order.index(row.k), row.method)
    )
    others = [row for row in rows if row not in first and row not in main]
    yield from ((row, True) for row in (*first, *main))
    # Beside the model's own score on the same few items.
    yield from ((row, False) for row in (*(row for row in first if row.method == TEACHER), *others))
    yield from ((row, True) for row in others)


class Measurer:
    """Measures candidates with the weights that each is named with."""

    def __init__(self, bench: Bench, items: Items) -> None:
        self.bench, self.items = bench, items
        self._final: tuple[Candidate, Evaluator] | None = None

    def evaluator(self, candidate: Candidate) -> Evaluator:
        """The supernet's, or one with the finalised weights of this very placement; the last of these is kept."""
        if candidate.weights in (TEACHER, "supernet"):
            return self.bench.supernet_evaluator
        if self._final is None or self._final[0] != candidate:
            self._final = None
            net = self.bench.supernet()
            _, _, remedy = candidate.weights.partition(":")
            use_final(net, final_folder(self.bench.run, candidate.placement, remedy))
            self.bench.forget()
            self._final = candidate, self.bench.evaluator(net)
        return self._final[1]

    def version(self, candidate: Candidate) -> str:
        return TEACHER if candidate.weights == TEACHER else self.evaluator(candidate).supernet.version

    def held_out(self, candidates: Sequence[Candidate]) -> None:
        """Loss and KL on the test split, of candidates with the same weights."""
        wanted = [c for c in candidates if not self.items.has(subject(c), self.version(c), "kl")]
        for start in range(0, len(wanted), GROUP):
            group = wanted[start : start + GROUP]
            found = self.evaluator(group[0]).held_out([c.placement for c in group], "test")
            for candidate in group:
                loss, kl = found[candidate.placement]
                self.items.add(subject(candidate), self.version(candidate), {"loss": loss.numpy(), "kl": kl.numpy()})

    def recalled(self, candidate: Candidate) -> tuple[float, float]:
        """The share of key-value questions that are answered, of the first length that every placement is asked, and
        its standard error; NaN where none is asked."""
        lengths = [n for n in self.bench.recipe.quick_retrieval if n <= self.bench.shape.max_context][:1]
        for length in lengths:
            task = parse_task(f"retrieval@{length}:{self.bench.recipe.retrieval_items}")
            self.tasks(candidate, [task])
            return mean_and_error(self.items.get(subject(candidate), measure_name(task, task.label)))
        return math.nan, math.nan

    def tasks(self, candidate: Candidate, tasks: Sequence[Task]) -> None:
        """The tasks that are not measured yet."""
        version = self.version(candidate)
        evaluator = self.evaluator(candidate)
        for task in tasks:
            if self.items.has(subject(candidate), version, measure_name(task, task.label)):
                continue
            found = task.measures(evaluator.supernet.select(candidate.placement), evaluator.context("test"))
            values = {measure_name(task, label): column.numpy() for label, column in found.items()}
            self.items.add(subject(candidate), version, values)


def measure_all(bench: Bench, items: Items, refresh: Callable[[], None]) -> bool:
    """Measures the candidates for `measure_seconds`, and says whether all is done. Every value is on the disk at once.

    Args:
        refresh: called now and then, to write the tables anew.
    """
    measurer = Measurer(bench, items)
    rows = bench.plan.candidates
    ends = time.monotonic() + bench.recipe.measure_seconds
    for weights in dict.fromkeys(row.weights for row in rows):
        mine = [row for row in rows if row.weights == weights]
        together = [mine] if weights in (TEACHER, "supernet") else [[row] for row in mine]
        for group in together:
            measurer.held_out(group)
    refresh()
    todo = list(queue(bench))
    told = time.monotonic()
    for done, (candidate, full) in enumerate(todo):
        if time.monotonic() > ends:
            bench.log(f"{done} of {len(todo)} placements measured: the same command goes on")
            return False
        measurer.tasks(candidate, tasks_of(bench, full))
        bench.progress("measure", done + 1, len(todo))
        if time.monotonic() - told > 20:
            refresh()
            told = time.monotonic()
    refresh()
    return True


def measure_speeds(bench: Bench) -> None:
    """Decode speeds of the compositions in the table, those of chosen placements first, for `speed_seconds`."""
    ends = time.monotonic() + bench.recipe.speed_seconds
    rows = bench.plan.candidates
    for candidate in sorted(rows, key=lambda row: (not is_chosen(row), row.fill != "best")):
        if time.monotonic() > ends:
            return
        bench.speeds.measure(candidate.placement, bench.device, bench.dtype, bench.log)
