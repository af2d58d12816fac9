"""All search strategies on one trained supernet, at equal evaluations and at equal seconds.

    python benchmarks/strategies.py runs/NAME --out reports/strategies [--evaluations 96] [--seeds 3] [--limit 600]
    python benchmarks/strategies.py --draw reports/strategies      the page and the figure again, from the CSV files

Every search keeps its scores apart from the others, so that each pays for what it asks. Common to all, and not counted,
are the layers' importance and the baselines. Points are chosen on the search split and judged on the test split.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.common import parser_of, run
from benchmarks.strategies_page import Best, Summary, draw, tables
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.dtypes import torch_dtype
from nasbench.core.errors import UserError
from nasbench.core.provenance import provenance
from nasbench.core.sizes import format_size, parse_size
from nasbench.core.tables import write_table
from nasbench.cost import CostModel, find_profiles, load_cost_model
from nasbench.devices import detect
from nasbench.evaluation.evaluator import Evaluator, scoring_corpus
from nasbench.model.shapes import ModelSpec
from nasbench.runs import Run
from nasbench.search.limits import Costs
from nasbench.search.objective import Measured, RunObjective, model_speed
from nasbench.search.pareto import Floats, front, hypervolume
from nasbench.search.run_target import run_db, run_target
from nasbench.search.session import Options, Session, baselines, run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import UNIFORM, Target
from nasbench.spaces.placement import Placement, format_placement
from nasbench.spaces.space import count_full
from nasbench.supernet.supernet import Supernet
from nasbench.supernet.trained import run_dtype, trained_with

SAME_FOR_EVERY_SEED = ("beam", "kl-greedy", "greedy-swap", "kl-remove", "one-swap", "exact", UNIFORM)
LAST = ("optuna-gp",)
"""Strategies that may take the whole time."""
EVALUATIONS, SECONDS = "evaluations", "seconds"
DRAWS = 500
SHARE, FEWEST = 0.4, 24
"""Part of the time for equal evaluations of one seed, and the fewest of each strategy where that is too little."""
MOST_MORE = 4
"""Times the evaluations that equal seconds may give."""


class TimeUp(Exception):
    """A search has no time left."""


class Timed(RunObjective):
    """Notes how long the scores of each placement took, and stops none early."""

    ledger: dict[Placement, float]
    measuring_s = 0.0

    def measure(self, placements: Sequence[Placement]) -> list[Measured]:
        began = time.perf_counter()
        found = super().measure(placements)
        spent = time.perf_counter() - began
        self.measuring_s += spent
        fresh = [placement for placement in placements if placement not in self.ledger]
        self.ledger.update(dict.fromkeys(fresh, spent / max(1, len(fresh))))
        return found

    def race(self, placements: Sequence[Placement], keep: int) -> dict[Placement, tuple[Placement, float]]:
        return {}


@dataclass
class Ran:
    """One search: what it looked at, with scores, and what that took."""

    equal: str
    strategy: str
    seed: int
    evaluations: int
    seconds: float
    scores: dict[Placement, float]
    note: str = ""
    best: list[Best] = field(default_factory=list)
    volumes: Floats = field(default_factory=lambda: np.full(1 + DRAWS, np.nan))
    """[1 + DRAWS] hypervolumes, the first over all rows of text, the others over rows that are drawn again."""


class Arena:
    """A supernet and a target, on which searches run apart from each other."""

    def __init__(self, opened: Run, options: argparse.Namespace, scratch: Path) -> None:
        self.run, self.options, self.scratch = opened, options, scratch
        self.ends = self.stops = time.monotonic() + options.limit
        shape = resolve_shape(opened.spec.model)
        self.db, self.target, self.cost = find_target(opened, shape, options)
        kind = torch_dtype(run_dtype(opened.path, options.eval_dtype, options.device))
        self.supernet = Supernet.load(opened, dtype=kind, device=options.device)
        self.corpus = scoring_corpus(opened, shape, self.supernet.tokenizer)
        self.memo: dict[object, Any] = {}
        self.ledgers: dict[tuple[str, int], dict[Placement, float]] = {}
        self.counts = tuple(int(k) for k in options.full_attention.split(","))
        self.judge = self.evaluator(scratch / "common")
        common, world = self.session(scratch / "common", {}, 0, 1)
        baselines(common)
        start = [0.0] * len(common.layer_importance)
        with contextlib.suppress(Exception):  # compiles the kernels of a way back; what fails is told of the strategy
            world.gates(common.base, start, self.counts, 1, 0)
        self.common, self.base, self.full = dict(world.ledger), common.base, common.space.original
        rows = self._rows(self.full)
        self._drawn = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), DRAWS)
        info = detect(options.device)
        found = provenance(info.slug, info.driver)
        self.versions = found.cells("device", "torch", "driver", "project", "measured_utc")
        # Of one evaluation; the first ones compile kernels.
        self.seconds = float(np.percentile(list(self.common.values()), 25))
        self.tokens = self.corpus.held_out("search", self.judge.tokens["search"]).tokens.numel()

    def evaluator(self, folder: Path) -> Evaluator:
        options, opened = self.options, replace(self.run, path=folder)
        return Evaluator(
            opened, self.supernet, self.corpus, search_tokens=parse_size(options.search_tokens),
            test_tokens=parse_size(options.test_tokens), memo=self.memo,
        )  # fmt: skip

    def session(
        self, folder: Path, ledger: dict[Placement, float], seed: int, evaluations: int
    ) -> tuple[Session, Timed]:
        costs = Costs(self.cost.shape, self.cost, self.db)
        world = Timed(self.target, self.evaluator(folder), model_speed(self.cost, self.target), "kl", costs=costs)
        world.ledger = ledger
        chosen = Options(full_attention=self.counts, evaluations=evaluations, seed=seed)
        return Session(folder, world, chosen, self._look_at_the_clock), world

    def _look_at_the_clock(self, what: str, done: int, total: int) -> None:
        if time.monotonic() > self.stops:
            raise TimeUp

    def search(self, equal: str, strategy: str, seed: int, evaluations: int) -> Ran:
        """Runs a strategy that pays for all that it asks; what it asked at equal evaluations already keeps its time."""
        folder = self.scratch / f"{equal}-{strategy}-{seed}"
        before = self.scratch / f"{EVALUATIONS}-{strategy}-{seed}"
        shutil.copytree((before if before.is_dir() else self.scratch / "common") / "scores", folder / "scores")
        ledger = self.ledgers.setdefault((strategy, seed), dict(self.common))
        session, world = self.session(folder, ledger, seed, evaluations)
        began, note = time.perf_counter(), ""
        self.stops = min(self.ends, time.monotonic() + self.options.cap)
        try:
            run_search(session, strategy)
        except TimeUp:
            note = f"stopped after {time.perf_counter() - began:.0f} s"
        except Exception as error:  # a strategy that fails leaves the others their turn
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        own_s = time.perf_counter() - began - world.measuring_s
        asked = [p for p in session.visited.get(strategy, ()) if p in session.known]
        scores = {p: session.known[p].score for p in asked}
        charged = session.charged.get(strategy, 0)
        return Ran(equal, strategy, seed, len(asked) + charged, own_s + sum(ledger[p] for p in asked), scores, note)

    def _rows(self, placement: Placement) -> Floats:
        """[rows] of KL on the test split."""
        samples = self.judge.measure([placement], "test", tasks=["kl"])[0]["kl"].samples
        assert samples is not None
        return samples

    def tok_s(self, placement: Placement) -> float:
        found = self.cost.decode(placement, self.target.context, self.target.batch).decode_tok_s
        assert found is not None
        return found

    def look(self, ran: Ran) -> None:
        """Measures a search's front and the best of each K on the test split."""
        found = sorted(ran.scores, key=lambda placement: (ran.scores[placement], placement))
        if not found:
            return
        points = [(ran.scores[placement], self.tok_s(placement)) for placement in found]
        chosen = [p for p, kept in zip(found, front(points, (False, True)), strict=True) if kept]
        best = {k: next((p for p in found if count_full(p) == k), None) for k in self.counts}
        self.judge.measure(list(dict.fromkeys([*chosen, *filter(None, best.values())])), "test", tasks=["kl"])
        for k, placement in best.items():
            if placement is not None:
                kl = self.judge.measure([placement], "test", tasks=["kl"])[0]["kl"]
                ran.best.append(
                    Best(
                        equal=ran.equal, strategy=ran.strategy, seed=ran.seed, k=k,
                        placement=format_placement(placement), kl_search=ran.scores[placement], kl_test=kl.value,
                        kl_test_stderr=kl.stderr, decode_tok_s=self.tok_s(placement),
                    )
                )  # fmt: skip
        rows = np.array([self._rows(placement) for placement in (self.base, *chosen)])
        means = np.concatenate([rows.mean(1)[None], self._drawn @ rows.T / rows.shape[1]])
        speeds, most = [self.tok_s(placement) for placement in chosen], self.tok_s(self.base)
        least = self.tok_s(self.full) if most > self.tok_s(self.full) else 0.0
        ran.volumes = np.array(
            [
                hypervolume(list(zip(kl[1:], speeds, strict=True)), (kl[0], least), (False, True))
                / (kl[0] * (most - least))
                for kl in means
            ]
        )


def find_target(opened: Run, shape: ModelSpec, options: argparse.Namespace) -> tuple[Path | None, Target, CostModel]:
    """The target of the run's last search, or the largest profiled one at which all kinds are measured: in the
    databases asked for, the run's own, or those of the package."""
    asked = (options.device, options.profile, options.context, options.batch, options.dtype)
    reasons: list[UserError] = []
    for place in (options.db,) if options.db else (run_db(opened, None), opened.path / "profiles", None):
        try:
            first = run_target(opened, shape, place, *asked)
            cost, rows = load_cost_model(first.device, shape, first.dtype, place), find_profiles(first.device, place)
        except UserError as error:
            reasons.append(error)
            continue
        points = {(r.context, r.batch) for r in rows if r.mode == "decode" and 0 < r.context <= shape.max_context}
        for target in (first, *(replace(first, context=c, batch=b) for c, b in sorted(points, reverse=True))):
            try:
                for name in opened.spec.space.names:
                    cost.decode(opened.spec.space.homogeneous(name), target.context, target.batch)
                return place, target, cost
            except UserError as error:
                reasons.append(error)
    raise reasons[0]


def summarise(arena: Arena, every: Sequence[Ran]) -> list[Summary]:
    """One row for each strategy and each of the two ways to be fair."""
    found = []
    for equal, strategy in dict.fromkeys((ran.equal, ran.strategy) for ran in every):
        mine = [ran for ran in every if (ran.equal, ran.strategy) == (equal, strategy)]
        volumes = np.array([ran.volumes for ran in mine])
        even = next((ran.volumes for ran in every if (ran.equal, ran.strategy) == (equal, UNIFORM)), np.nan)
        mean = volumes.mean(0)
        low, high = np.percentile(mean[1:], (2.5, 97.5))
        above = mean - even
        above_low, above_high = np.percentile(above[1:], (2.5, 97.5))
        used = statistics.mean(ran.evaluations for ran in mine)
        found.append(
            Summary(
                equal=equal, strategy=strategy, seeds=len(mine), evaluations=used,
                seconds=statistics.mean(ran.seconds for ran in mine), tokens=used * arena.tokens,
                hypervolume=mean[0], low=low, high=high, least_seed=volumes[:, 0].min(),
                most_seed=volumes[:, 0].max(), above_even=above[0], above_low=above_low, above_high=above_high,
                note="; ".join(dict.fromkeys(ran.note for ran in mine if ran.note)), **arena.versions,
            )
        )  # fmt: skip
    return sorted(found, key=lambda row: (row.equal, -np.nan_to_num(row.hypervolume), row.strategy))


def introduction(arena: Arena) -> str:
    spec, options, settings = arena.run.spec, arena.options, trained_with(arena.run.path)
    trained = "".join(f", {key} {settings[key]}" for key in ("align_tokens", "supernet_tokens") if key in settings)
    return f"""# Search strategies compared

{spec.model}, {spec.num_layers} layers, kinds {", ".join(spec.names)}; supernet {arena.supernet.version}{trained}.
Scored in {arena.judge.dtype}. The speed is decode tokens/s of {arena.target}.

- Equal evaluations: {options.evaluations} placements, K = {", ".join(map(str, arena.counts))}.
- Equal seconds: those of the median strategy at equal evaluations, at most {MOST_MORE} times the placements.
- A placement is scored by its KL on {format_size(arena.tokens)} tokens, without early stopping. Each search pays for
  all that it asks; the layers' importance and the baselines are common to all and not counted.
- What a search found is judged on other text, the test split.

The hypervolume is of KL (less is better) and decode tokens/s (more is better): a share of the box between the model
itself and the best placement without full attention. Its interval is over rows of text that are drawn again. The KL
columns are means over the seeds, in nats a token on the test split, of what was best on the search split.

    python benchmarks/strategies.py RUN --evaluations {options.evaluations} --seeds {options.seeds} \\
        --search-tokens {options.search_tokens} --test-tokens {options.test_tokens}

![hypervolume by strategy](hypervolume.png)

Every number is a row of [summary.csv](summary.csv) or [scores.csv](scores.csv).
"""


def compare(arena: Arena, out: Path) -> list[Ran]:
    """All strategies at equal evaluations and at equal seconds, with further seeds as long as the time lasts."""
    options = arena.options
    names = options.strategies.split(",") if options.strategies else list(STRATEGIES)
    names.sort(key=lambda name: (name in LAST, name != UNIFORM))
    # Equal evaluations and equal seconds take the same time, and seeds take more.
    room = int(SHARE * (arena.ends - time.monotonic()) / (arena.seconds * len(names)))
    if room < options.evaluations:
        options.evaluations = max(FEWEST, room)
        print(f"{options.evaluations} evaluations each: one takes {arena.seconds:.3f} s", flush=True)
    (out / "README.md").write_text(introduction(arena), encoding="utf-8")
    every: list[Ran] = []
    equal_s = 0.0
    for seed in range(options.seeds):
        for equal in (EVALUATIONS, SECONDS):
            for name in names:
                if seed and name in SAME_FOR_EVERY_SEED:
                    continue
                first = next((r for r in every if (r.strategy, r.seed) == (name, seed)), None)
                budget = options.evaluations
                if equal == SECONDS:
                    if first is None or not first.scores:
                        continue
                    budget = round(min(MOST_MORE, equal_s / first.seconds) * budget)
                if (every and time.monotonic() > arena.ends) or (seed and budget < len(arena.counts)):
                    continue
                ran = arena.search(equal, name, seed, max(len(arena.counts), budget))
                if seed and time.monotonic() > arena.ends:
                    continue  # it was cut short: the other seeds stand for it
                arena.look(ran)
                every.append(ran)
                write_table(out / "summary.csv", summarise(arena, every), Summary, digits=6)
                write_table(out / "scores.csv", [best for ran in every for best in ran.best], Best, digits=6)
                print(
                    f"{equal:11} seed {seed} {name:13} {ran.evaluations:4} evaluations {ran.seconds:7.2f} s "
                    f"hypervolume {ran.volumes[0]:.4f} {ran.note}", flush=True,
                )  # fmt: skip
            if seed == 0 and equal == EVALUATIONS:
                whole = [r.seconds for r in every if r.evaluations >= 0.9 * options.evaluations]
                equal_s = statistics.median(whole or [r.seconds for r in every])
                print(f"equal seconds: {equal_s:.2f}", flush=True)
            if seed == 0:
                print("\n".join(tables(summarise(arena, every), [best for r in every for best in r.best])), flush=True)
    return every


def work(options: argparse.Namespace) -> int:
    if options.draw:
        draw(options.draw)
        return 0
    if options.run is None or options.out is None:
        raise UserError("give a run folder and --out, or --draw with a folder of earlier results")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        arena = Arena(Run.open(options.run), options, Path(scratch))
        print(f"{arena.target}; supernet {arena.supernet.version}; {arena.tokens} tokens a score", flush=True)
        log = logging.getLogger("nasbench")
        log.addFilter(hushed := lambda record: record.levelno > logging.WARNING)  # all would say the same of the text
        try:
            every = compare(arena, options.out)
        finally:
            log.removeFilter(hushed)
        print("\n".join(tables(summarise(arena, every), [best for ran in every for best in ran.best])), flush=True)
    try:
        draw(options.out)
    except ImportError as error:
        print(f"no figure: {error}; --draw {options.out} makes it", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.set_defaults(out=None)
    parser.add_argument("run", type=Path, nargs="?", help="run folder with a distilled supernet")
    parser.add_argument("--draw", type=Path, help="only draw the results in this folder again")
    parser.add_argument("--strategies", default="", help="comma-separated; default: all")
    parser.add_argument("--full-attention", default="2,4,8")
    parser.add_argument("--evaluations", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3, help="of the strategies that draw anything")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--cap", type=float, default=60.0, help="seconds for one search")
    parser.add_argument("--search-tokens", default="8k")
    parser.add_argument("--test-tokens", default="32k")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--db", type=Path, help="folder or file of profile databases")
    for name in ("profile", "context", "batch", "dtype", "eval-dtype"):
        parser.add_argument(f"--{name}", default="", help="as of nasbench search")
    return run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
