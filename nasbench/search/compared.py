"""The placements of a run that are worth comparing, read from its files: the model itself, evenly spread and random
placements, the best of every search, and what was finalised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nasbench.core.errors import UserError
from nasbench.core.files import damaged, read_object
from nasbench.core.tables import read_table
from nasbench.runs import Run
from nasbench.search.trials import DRAWN, FILLERS, TEACHER, UNIFORM, Trial, best_of, latest, read_trials
from nasbench.spaces.placement import Placement, format_placement, parse_placement
from nasbench.spaces.space import count_full, is_full
from nasbench.supernet import checkpoint
from nasbench.supernet.finalize import final_folder

BEST, FINAL, SUPERNET = "best", "final", "supernet"


@dataclass(frozen=True)
class Compared:
    """A placement with weights.

    Attributes:
        k: layers with full attention.
        method: teacher, uniform, random-N, or the strategy that found it, with its objective where that is not KL.
        fill: "best" where every other layer has its best alternative, or the one kind that all have.
        weights: "teacher", "supernet", "final", or "final:VARIANT".
    """

    k: int
    method: str
    placement: Placement
    fill: str = BEST
    weights: str = SUPERNET

    @property
    def text(self) -> str:
        return format_placement(self.placement)

    @property
    def chosen(self) -> bool:
        """Whether it deserves every task: the model, what was finalised or searched, and the even spread beside it."""
        return self.fill == BEST and not self.method.startswith(DRAWN)


@dataclass(frozen=True)
class Benchmark:
    """A file of benchmark items: a row of runs/NAME/benchmarks.csv. `chance` is what guessing scores."""

    name: str
    items: int
    chance: float


def read_benchmarks(run: Run) -> dict[str, Benchmark]:
    """The benchmarks that placements of the run were measured on."""
    return {row.name: row for row in read_table(benchmarks_path(run), Benchmark)}


def benchmarks_path(run: Run) -> Path:
    """Where a run notes its benchmarks."""
    return run.path / "benchmarks.csv"


def latest_trials(run: Run) -> list[Trial]:
    """The trials of the target and the weights that were searched last. Raises UserError where there are none."""
    trials = read_trials(run.trials)
    if not trials:
        raise UserError(f"{run.path} has no trials: run `nasbench search {run.path} -k 4,8`")
    return latest(trials, trials[-1].target)


def best_searched(run: Run, count: int) -> Placement:
    """The best placement with `count` full-attention layers that any search found. Raises UserError where none did."""
    trials = latest_trials(run)
    mine = [trial for trial in trials if trial.k == count]
    if not mine:
        known = ", ".join(map(str, sorted({trial.k for trial in trials})))
        raise UserError(
            f"no searched placement of {count} full-attention layers (there are: {known}): "
            f"run `nasbench search {run.path} -k {count}`"
        )
    found = [trial for trial in mine if _searched(trial)]
    return best_of(found or mine).layers


def composition(placement: Placement) -> str:
    """`4A 26J`: how many layers of each kind, which is all that the decode speed depends on."""
    return " ".join(f"{placement.count(name)}{name}" for name in sorted(set(placement)))


def compositions(run: Run) -> list[Placement]:
    """One of the compared placements for every composition, those of searches and finalised ones first."""
    rows = sorted(compared(run), key=lambda row: not row.chosen)
    found: dict[str, Placement] = {}
    for row in rows:
        found.setdefault(composition(row.placement), row.placement)
    return list(found.values())


def compared(run: Run, trials: Sequence[Trial] | None = None) -> list[Compared]:
    """All of them, the most full attention first; one K's placements in the order of method. A placement that two
    searches found stands there for each.

    Args:
        trials: all of the run, where they have been read.
    """
    trials = latest(trials, trials[-1].target) if trials else latest_trials(run)
    original = run.spec.space.original
    base = _base(trials)
    rows = [Compared(count_full(original), TEACHER, original, weights=TEACHER)]
    hybrids = [trial for trial in trials if trial.layers != original]
    for count in sorted({trial.k for trial in hybrids}, reverse=True):
        mine = [trial for trial in hybrids if trial.k == count]
        even = [trial for trial in mine if trial.strategy in (UNIFORM, FILLERS)]
        if not even:
            continue  # a K that a search of all layers passed by
        rows += _even(count, even, base)
        # Without full attention there is nothing to place: only other replacements are another placement.
        known = {trial.placement for trial in even} if not count else set()
        others = [t for t in mine if t.strategy not in (UNIFORM, FILLERS) and t.placement not in known]
        for method in dict.fromkeys(map(_method, others)):
            found = best_of(trial for trial in others if _method(trial) == method)
            rows.append(Compared(count, method, found.layers))
    rows += _finalised(run, rows, trials[-1].supernet)
    return sorted(rows, key=lambda row: (-row.k, row.method != TEACHER, row.weights.startswith(FINAL)))


def unsearched(run: Run) -> list[Compared]:
    """The model itself and what was finalised, of a run that nobody has searched."""
    original, saved = run.spec.space.original, checkpoint.latest(run.supernet)
    rows = [Compared(count_full(original), TEACHER, original, weights=TEACHER)]
    return [*rows, *_finalised(run, rows, saved.version)] if saved is not None else rows


def _method(trial: Trial) -> str:
    baseline = trial.strategy.startswith(DRAWN) or trial.objective in ("loss", "kl")
    return trial.strategy if baseline else f"{trial.strategy}, {trial.objective}"


def _searched(trial: Trial) -> bool:
    return trial.strategy not in (TEACHER, UNIFORM, FILLERS) and not trial.strategy.startswith(DRAWN)


def _base(trials: Sequence[Trial]) -> Placement:
    """The replacement of every layer: the best trial without full attention that began the search."""
    tried = [trial for trial in trials if trial.strategy == FILLERS]
    tried = tried or [trial for trial in trials if trial.k == 0]
    return best_of(tried).layers if tried else ()


def _even(count: int, trials: Iterable[Trial], base: Placement) -> list[Compared]:
    """The evenly spread placements: one with the base's replacements, and one of each kind alone."""
    found = []
    for placement in dict.fromkeys(trial.layers for trial in trials):
        own = {name for name in placement if not is_full(name)}
        if all(name == other for name, other in zip(placement, base or placement, strict=True) if not is_full(name)):
            found.append(Compared(count, UNIFORM, placement))
        if len(own) == 1:
            found.append(Compared(count, UNIFORM, placement, own.pop()))
    return sorted(found, key=lambda row: row.fill != BEST)


def _finalised(run: Run, rows: Sequence[Compared], version: str) -> list[Compared]:
    """What was finalised from the present supernet, the plain variant first."""
    found = []
    for path in sorted(run.final.glob("*/final.json")):
        data = read_object(path)
        if data.get("supernet") != version:
            continue
        with damaged(path, "finalize again"):
            placement = parse_placement(str(data["placement"]))
        variant = path.parent.name.removeprefix(final_folder(run, placement).name).removeprefix("@")
        same = [row.method for row in rows if row.placement == placement and row.fill == BEST]
        weights = f"{FINAL}:{variant}" if variant else FINAL
        found.append(Compared(count_full(placement), same[-1] if same else FINAL, placement, weights=weights))
    return found
