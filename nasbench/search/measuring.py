"""Many placements measured on many tasks: the most telling first, as far as the seconds go, by several processes.

A process beside the main one is `nasbench eval RUN --share 1/2 --device cuda:1 ...`: it measures its share of the queue
and adds to the run's scores. What the main process could not hand out, it measures itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import UserError, unknown
from nasbench.core.tables import write_table
from nasbench.evaluation.evaluator import TEXT, Evaluator, scoring_corpus
from nasbench.evaluation.suite import Suite, chance, read_items
from nasbench.evaluation.tasks import Task, parse_task
from nasbench.parallel.pool import Pool
from nasbench.runs import Run
from nasbench.search.compared import FINAL, SUPERNET, Benchmark, Compared, benchmarks_path, compared, unsearched
from nasbench.search.trials import TEACHER
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import count_full
from nasbench.supernet.budget import release_memory
from nasbench.supernet.finalize import final_folder, final_version, use_final
from nasbench.supernet.supernet import Supernet

GROUP = 8
"""Placements whose held-out loss is measured together: they share the layers they begin with."""
SETS = ("auto", "final", "searched")
POLL_S = 0.2

Pair = tuple[Compared, tuple[Task, ...]]
"""A placement and what is measured of it."""
Log = Callable[[str], None]


def suite_tasks(run: Run, folder: Path, limit: int, note: bool = True) -> tuple[list[Task], list[Task]]:
    """(all items, `limit` items) of every .jsonl file of a folder; notes them in runs/NAME/benchmarks.csv, if told to.

    Raises UserError for a folder without benchmarks and for a file that is none.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise UserError(f"bad --suite {folder}: choose a folder with .jsonl files of benchmark items")
    rows = [Benchmark(path.stem, len(items), chance(items)) for path in paths for items in [read_items(path)]]
    if note:
        write_table(benchmarks_path(run), rows, Benchmark)
    return [Suite(path) for path in paths], [Suite(path, limit) for path in paths]


def choose(run: Run, text: str, parse: Callable[[str], Placement]) -> list[Compared]:
    """The placements of `auto` (all that are compared), `final`, `searched`, or of a file with one on each line."""
    if text in SETS:
        rows = unsearched(run) if text == "final" and not run.trials.is_file() else compared(run)
        keep = {"final": lambda row: row.weights.startswith(FINAL), "searched": lambda row: row.chosen}.get(text)
        return [row for row in rows if keep is None or keep(row) or row.method == TEACHER]
    path = Path(text)
    if not path.is_file():
        raise unknown("set of placements", text, (*SETS, "a file with one on each line"))
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Compared(count_full(layers), "file", layers) for layers in map(parse, lines)]


def queue(rows: Sequence[Compared], tasks: Sequence[Task], brief: Sequence[Task]) -> list[Pair]:
    """What is measured, in order: the model and what was finalised, what was searched, then all others briefly, and in
    the end those whole. Without `brief` tasks, everything at once."""
    first = [row for row in rows if row.method == TEACHER or row.weights.startswith(FINAL)]
    chosen = [row for row in rows if row.chosen and row not in first]
    others = [row for row in rows if not row.chosen and row not in first]
    pairs = [(row, tuple(tasks)) for row in (*first, *chosen)]
    pairs += [(row, tuple(brief)) for row in others if brief]
    return [*pairs, *((row, tuple(tasks)) for row in others)]


def share_of(pairs: Sequence[Pair], number: int, of: int) -> list[Pair]:
    """What process `number` of `of` measures: placements are dealt out in turn, in the order in which they first come.
    All that is measured of one stays in one process, so that nothing is measured twice."""
    places: dict[tuple[Placement, str], int] = {}
    for row, _ in pairs:
        places.setdefault((row.placement, row.weights), len(places))
    return [pair for pair in pairs if places[pair[0].placement, pair[0].weights] % of == number]


class Measurer:
    """Scores compared placements with the supernet's or with finalised weights.

    Args:
        test_tokens: held-out tokens of loss and KL, None for all.
    """

    def __init__(self, run: Run, *, device: str, dtype: torch.dtype, test_tokens: int | None) -> None:
        self.run, self.device, self._dtype, self._tokens = run, device, dtype, test_tokens
        self._loaded = load_model(run.spec.model, dtype=dtype, device=device)
        self._corpus = scoring_corpus(run, self._loaded.shape, self._loaded.tokenizer)
        self._memo: dict[object, Any] = {}
        self.supernet = self._evaluator(self._net())
        self._final: tuple[Path, str, Evaluator] | None = None

    def _net(self) -> Supernet:
        return Supernet.load(self.run, dtype=self._dtype, device=self.device, loaded=self._loaded)

    def _evaluator(self, net: Supernet) -> Evaluator:
        return Evaluator(self.run, net, self._corpus, test_tokens=self._tokens, memo=self._memo)

    def evaluator(self, row: Compared) -> Evaluator:
        """Of the row's weights; of finalised ones the last are kept."""
        if not row.weights.startswith(FINAL):
            return self.supernet
        folder = final_folder(self.run, row.placement, row.weights.partition(":")[2])
        version = final_version(folder)
        if self._final is None or self._final[:2] != (folder, version):
            self._final = None
            release_memory(self.device)
            net = self._net()
            use_final(net, folder)
            self._final = folder, version, self._evaluator(net)
        return self._final[2]

    def missing(self, pair: Pair) -> list[Task]:
        """The tasks that are not measured yet."""
        evaluator = self.evaluator(pair[0])
        context = evaluator.context("test")
        return [task for task in pair[1] if evaluator.known(pair[0].placement, task, context) is None]

    def measure(self, pair: Pair) -> None:
        if missing := self.missing(pair):
            self.evaluator(pair[0]).measure([pair[0].placement], "test", tasks=missing)

    def held_out(self, rows: Sequence[Compared]) -> None:
        """Loss and KL of every row; placements with the same weights together."""
        shared = sorted({row.placement for row in rows if row.weights in (TEACHER, SUPERNET)})
        for start in range(0, len(shared), GROUP):
            self.supernet.measure(shared[start : start + GROUP], "test")
        for row in rows:
            if row.weights.startswith(FINAL):
                self.measure((row, tuple(map(parse_task, TEXT))))


def measure_share(measurer: Measurer, pairs: Sequence[Pair], ends: float, log: Log) -> bool:
    """Measures the pairs until `ends`, in seconds since 1970. Returns whether all are done."""
    for done, pair in enumerate(pairs):
        if time.time() > ends:
            log(f"time is up: {done} of {len(pairs)} placements measured")
            return False
        measurer.measure(pair)
        log(f"{done + 1} of {len(pairs)}: {pair[0].text}, {pair[0].weights}")
    return True


def measure_all(
    measurer: Measurer,
    pairs: Sequence[Pair],
    pool: Pool,
    shares: Sequence[int],
    of: int,
    ends: float,
    log: Log,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bool:
    """Measures share 0 of `of` while the pool measures `shares`, one a child, and then those of children that fail.

    Returns whether everything is done when time is up or the children have ended.
    """
    todo, done = share_of(pairs, 0, of), 0
    while True:
        # Before `failed`: who ends in between is reported in the next round.
        running = pool.running()
        for number, reason in pool.failed():
            log(f"measuring on {pool.jobs[number].title} stopped, {measurer.device} does the rest: {reason}")
            todo = sorted({*todo, *share_of(pairs, shares[number], of)}, key=pairs.index)
        if todo and time.time() <= ends:
            measurer.measure(todo.pop(0))
            done += 1
            progress(done, done + len(todo))
        elif running:
            time.sleep(POLL_S)
        else:
            break
    left = sum(bool(measurer.missing(pair)) for pair in pairs)
    if left:
        log(f"{len(pairs) - left} of {len(pairs)} measurements done: the same command continues")
    return not left
