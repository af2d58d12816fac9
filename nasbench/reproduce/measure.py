"""What is measured of every candidate of the table, the most telling first, as far as the seconds go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nasbench.evaluation.evaluator import Evaluator
from nasbench.evaluation.suite import Suite
from nasbench.evaluation.tasks import Task, parse_task
from nasbench.parallel.pool import Job, Team
from nasbench.reproduce.bench import Bench
from nasbench.reproduce.items import Items, Subject, mean_and_error, subject_of
from nasbench.reproduce.recipe import Candidate
from nasbench.reproduce.searching import SEARCHED
from nasbench.search.trials import TEACHER, UNIFORM
from nasbench.spaces.placement import format_placement
from nasbench.supernet.finalize import final_folder, final_version, use_final

GROUP = 8
"""Placements whose held-out loss is measured together: they share the layers they begin with."""
REFRESH_S = 20.0
"""Seconds between two writings of the tables while placements are measured, at least."""
REFRESH_SHARE = 0.02
"""The share of the time that writing them takes, at most."""
Pair = tuple[Candidate, bool]
"""A candidate, and whether it is asked everything."""


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


def queue(bench: Bench) -> Iterator[Pair]:
    """What is asked, in the order of measuring: the model and what was finalised, what else was chosen, then all others
    briefly, and in the end those at length, too."""
    rows = bench.plan.candidates
    first = [row for row in rows if row.method == TEACHER or row.weights.startswith("final")]
    order = list(dict.fromkeys((*bench.recipe.finalized, *bench.recipe.counts)))
    main = sorted(
        (row for row in rows if is_chosen(row) and row not in first), key=lambda row: (order.index(row.k), row.method)
    )
    others = [row for row in rows if row not in first and row not in main]
    yield from ((row, True) for row in (*first, *main))
    yield from ((row, False) for row in others)
    yield from ((row, True) for row in others)


def share_of(pairs: Sequence[Pair], number: int, of: int) -> list[Pair]:
    """What process `number` of `of` measures: the placements are dealt out in turn, in the order in which they first
    come. All that is asked of one stays in one process, so that nothing is measured twice."""
    places: dict[Subject, int] = {}
    for candidate, _ in pairs:
        places.setdefault(subject_of(candidate), len(places))
    return [pair for pair in pairs if places[subject_of(pair[0])] % of == number]


class Measurer:
    """Measures candidates with the weights that each is named with."""

    def __init__(self, bench: Bench, items: Items) -> None:
        self.bench, self.items = bench, items
        self._final: tuple[Candidate, Evaluator] | None = None
        self._versions: dict[Subject, str] = {}

    def evaluator(self, candidate: Candidate) -> Evaluator:
        """The supernet's, or one with the finalised weights of this very placement; the last of these is kept."""
        if candidate.weights in (TEACHER, "supernet"):
            return self.bench.supernet_evaluator
        if self._final is None or self._final[0] != candidate:
            self._final = None
            net = self.bench.supernet()
            use_final(net, self._folder(candidate))
            self.bench.forget()
            self._final = candidate, self.bench.evaluator(net)
        return self._final[1]

    def _folder(self, candidate: Candidate) -> Path:
        """Of finalised weights."""
        _, _, remedy = candidate.weights.partition(":")
        return final_folder(self.bench.run, candidate.placement, remedy)

    def version(self, candidate: Candidate) -> str:
        """Names the weights that a candidate has now."""
        if candidate.weights == TEACHER:
            return TEACHER
        if candidate.weights == "supernet":
            return self.bench.supernet_evaluator.supernet.version
        key = subject_of(candidate)
        if key not in self._versions:
            self._versions[key] = final_version(self._folder(candidate))
        return self._versions[key]

    def held_out(self, candidates: Sequence[Candidate]) -> None:
        """Loss and KL on the test split, of candidates with the same weights."""
        # A placement that two searches found is measured once.
        by_subject = {subject_of(c): c for c in candidates}
        wanted = [c for named, c in by_subject.items() if not self.items.has(named, self.version(c), "kl")]
        for start in range(0, len(wanted), GROUP):
            group = wanted[start : start + GROUP]
            found = self.evaluator(group[0]).held_out([c.placement for c in group], "test")
            for candidate in group:
                loss, kl = found[candidate.placement]
                self.items.add(subject_of(candidate), self.version(candidate), {"loss": loss.numpy(), "kl": kl.numpy()})

    def recalled(self, candidate: Candidate) -> tuple[float, float]:
        """The share of key-value questions that are answered, of the first length that every placement is asked, and
        its standard error; NaN where none is asked."""
        lengths = [n for n in self.bench.recipe.quick_retrieval if n <= self.bench.shape.max_context][:1]
        for length in lengths:
            task = parse_task(f"retrieval@{length}:{self.bench.recipe.retrieval_items}")
            self.tasks(candidate, [task])
            return mean_and_error(self.items.get(subject_of(candidate), measure_name(task, task.label)))
        return math.nan, math.nan

    def missing(self, candidate: Candidate, tasks: Sequence[Task]) -> list[Task]:
        """The tasks that are not measured yet."""
        named, version = subject_of(candidate), self.version(candidate)

        def known(task: Task) -> bool:
            # Who was asked all items was asked the few among them.
            names = {measure_name(task, task.label)} | ({task.path.stem} if isinstance(task, Suite) else set())
            return any(self.items.has(named, version, name) for name in names)

        return [task for task in tasks if not known(task)]

    def tasks(self, candidate: Candidate, tasks: Sequence[Task]) -> None:
        """Measures the tasks that are not measured yet."""
        for task in self.missing(candidate, tasks):
            evaluator = self.evaluator(candidate)
            found = task.measures(evaluator.supernet.select(candidate.placement), evaluator.context("test"))
            values = {measure_name(task, label): column.numpy() for label, column in found.items()}
            self.items.add(subject_of(candidate), self.version(candidate), values)

    def pair(self, pair: Pair) -> None:
        """All that the queue asks of a candidate at this place."""
        self.tasks(pair[0], tasks_of(self.bench, pair[1]))

    def unfinished(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Those of which something is not measured yet."""
        return [pair for pair in pairs if self.missing(pair[0], tasks_of(self.bench, pair[1]))]


def measure_share(measurer: Measurer, number: int, of: int, ends: float) -> None:
    """What a process beside the main one does: its share of the queue, until `ends`, in seconds since 1970."""
    bench = measurer.bench
    todo = share_of(list(queue(bench)), number, of)
    for done, pair in enumerate(todo):
        if time.time() > ends:
            bench.log(f"time is up: {done} of {len(todo)} placements measured")
            return
        measurer.pair(pair)
        bench.log(f"{done + 1} of {len(todo)}: {format_placement(pair[0].placement)}, {pair[0].weights}")


def measure_all(bench: Bench, items: Items, refresh: Callable[[], None], helpers: Sequence[str] = ()) -> bool:
    """Measures the candidates for `measure_seconds`, and says whether all is done. Every value is on the disk at once.

    Args:
        refresh: called now and then, to write the tables anew.
        helpers: torch devices beside the bench's own. A process on each takes its share of the placements; held-out
            losses, which share layers, stay here, and so does the share of a process that fails.
    """
    measurer, of = Measurer(bench, items), 1 + len(helpers)
    # The clock that processes share.
    ends = time.time() + bench.recipe.measure_seconds
    order = list(queue(bench))
    dtype = str(bench.dtype).removeprefix("torch.")
    job = Job(str(bench.out), bench.device, dtype, 0, of, ends, bench.recipe.as_json())
    with Team(job, helpers) as team:
        for number in range(1, of):
            if time.time() <= ends and measurer.unfinished(share_of(order, number, of)):
                team.start(number)
        held_out_all(measurer)
        refresh()
        work_through(measurer, order, team, refresh)
    items.read()
    refresh()
    left = measurer.unfinished(order)
    if left:
        bench.log(f"{len(order) - len(left)} of {len(order)} placements measured: the same command goes on")
    return not left


def held_out_all(measurer: Measurer) -> None:
    """Held-out losses of every candidate, those with the same weights together."""
    rows = measurer.bench.plan.candidates
    for weights in dict.fromkeys(row.weights for row in rows):
        mine = [row for row in rows if row.weights == weights]
        together = [mine] if weights in (TEACHER, "supernet") else [[row] for row in mine]
        for group in together:
            measurer.held_out(group)


def work_through(measurer: Measurer, order: Sequence[Pair], team: Team, refresh: Callable[[], None]) -> None:
    """Measures the main process's share of `order`, and those of team members that fail, until the team's time is up
    or all is done; waits for the team."""
    bench, job = measurer.bench, team.job
    todo, done, next_tables = share_of(order, 0, job.of), 0, time.monotonic() + REFRESH_S
    while True:
        # Asked before `fallen`: who ends in between is told of there next time.
        running = team.running()
        for number, reason in team.fallen():
            rest = f", {bench.device} does the rest" if time.time() <= job.ends else ""
            bench.log(f"measuring on {team.devices[number - 1]} stopped{rest}: {reason}")
            measurer.items.read()
            todo = sorted({*todo, *share_of(order, number, job.of)}, key=order.index)
        if todo and time.time() <= job.ends:
            measurer.pair(todo.pop(0))
            done += 1
            bench.progress("measure", done, done + len(todo))
        elif running:
            time.sleep(0.2)
        else:
            return
        if (began := time.monotonic()) > next_tables:
            refresh()
            ended = time.monotonic()
            next_tables = ended + max(REFRESH_S, (ended - began) / REFRESH_SHARE)


def measure_speeds(bench: Bench) -> None:
    """Decode speeds of the compositions in the table, those of chosen placements first, for `speed_seconds`."""
    ends = time.monotonic() + bench.recipe.speed_seconds
    rows = bench.plan.candidates
    for candidate in sorted(rows, key=lambda row: (not is_chosen(row), row.fill != "best")):
        if time.monotonic() > ends:
            return
        bench.speeds.measure(candidate.placement, bench.device, bench.dtype, bench.log)
