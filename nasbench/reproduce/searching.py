"""The search of a reproduction: the placements that the table compares, and which of them is finalised."""

from __future__ import annotations

import random
import time
from dataclasses import replace

from nasbench.core.dtypes import dtype_name
from nasbench.core.errors import MachineError
from nasbench.devices import detect
from nasbench.evaluation.evaluator import Evaluator
from nasbench.reproduce import recall
from nasbench.reproduce.bench import Bench
from nasbench.reproduce.recipe import Candidate, Recipe
from nasbench.search import strategies
from nasbench.search.objective import Loss, Speed
from nasbench.search.session import Options, Search, baselines
from nasbench.search.trials import TEACHER, UNIFORM, Target, Trial, best_of
from nasbench.spaces.placement import Placement, format_placement, kind_of, uniform_placement

STRATEGIES = ("beam", "kl-greedy")
SEARCHED = (*STRATEGIES, recall.METHOD)
MOST_EVALUATIONS = 1000
"""Of one search; a run that went on finds what it knows in no time, and would think the device that fast."""


class MeasuredObjective:
    """A search's world: losses of the supernet, decode speed as `Speeds` measured the pure models."""

    def __init__(self, bench: Bench, evaluator: Evaluator) -> None:
        self.space = evaluator.supernet.space
        context = bench.recipe.contexts[0]
        self.target = Target(detect(bench.device).slug, context, bench.speeds.batches[context], dtype_name(bench.dtype))
        self.version = evaluator.supernet.version
        self.reference_loss = 0.0
        self._bench, self._evaluator = bench, evaluator

    def losses(self, placements: list[Placement]) -> list[Loss]:  # type: ignore[override]
        measured = self._evaluator.measure(placements, "search")
        return [Loss(scores["loss"].value, scores["loss"].stderr, scores["kl"].value) for scores in measured]

    def speed(self, placement: Placement) -> Speed:
        found = self._bench.speeds.of(placement, self.target.context)
        if found is None:
            raise MachineError(
                f"no decode speed of {format_placement(placement)} at {self.target.context} could be had"
            )
        return found

    def importance(self, names: tuple[str, ...]) -> dict[tuple[int, str], float]:  # type: ignore[override]
        rows = self._evaluator.importance(names, lambda done, total: self._bench.progress("importance", done, total))
        # A single layer hardly moves the loss, by less than its noise; the divergence tells fillers apart.
        return {(row.layer, row.name): row.kl for row in rows}


def search(bench: Bench) -> None:
    """Beam and KL-greedy search of every 0 < K < layers, and the placements that they are compared with; all of them
    become candidates of the table."""
    recipe, layers = bench.recipe, bench.shape.num_layers
    for name in recipe.names:
        bench.speeds.measure((name,) * layers, bench.device, bench.dtype, bench.log)
    evaluator = bench.supernet_evaluator
    objective = MeasuredObjective(bench, evaluator)
    if bench.plan["searched"] == objective.version:
        return
    inner = tuple(count for count in recipe.counts if 0 < count < layers)
    options = Options(full_attention=inner, evaluations=1, seed=recipe.seed)
    began = time.monotonic()
    state = Search(bench.run.path, objective, options, bench.progress)  # type: ignore[arg-type]
    singles = len(state.useful) * layers + 1
    assert state.importance
    rate = singles / max(1e-6, time.monotonic() - began)
    # A search that was stopped asks again for what it knows: for the same number of evaluations.
    afforded = max(8 * len(inner), int(recipe.search_seconds * rate / len(SEARCHED)))
    evaluations = bench.plan["evaluations"] or min(afforded, MOST_EVALUATIONS)
    bench.plan["evaluations"] = evaluations
    state.options = replace(options, evaluations=evaluations)
    baselines(state)
    for name in STRATEGIES:
        strategies.STRATEGIES[name](state)
        bench.log(f"{name}: {evaluations} evaluations at most, {time.monotonic() - began:.0f} s since the search began")
    bench.plan["base"] = format_placement(state.base)
    found: dict[int, Placement] = {}
    if (judge := _recall(bench, evaluator, state.base)) is not None:
        # A question costs more tokens than the text: the same time for fewer of them.
        allowed = int(evaluations * recipe.search_tokens / (recipe.search_tokens + judge.tokens))
        found = recall.recall_greedy(state, judge, inner, allowed)
        for count in recipe.finalized:
            if count in found:
                starts = [found[count], *(best_of(rows).layers for rows in _by_strategy(state, count))]
                found[count] = recall.exchange(state, judge, starts, allowed)
        bench.log(f"recall: done, {time.monotonic() - began:.0f} s since the search began")
    bench.plan["candidates"] = []
    bench.plan.add_candidates(candidates(state, recipe, found))
    bench.plan["searched"] = objective.version
    bench.forget()


def _recall(bench: Bench, evaluator: Evaluator, base: Placement) -> recall.Recall | None:
    """What judges placements by text and answers; None where the recipe asks no questions."""
    lengths = bench.recipe.quick_retrieval
    if not lengths:
        return None
    return recall.Recall(evaluator, min(lengths[0], bench.shape.max_context), base, bench.recipe.seed)


def _by_strategy(state: Search, count: int) -> list[list[Trial]]:
    """The trials of K layers that each of STRATEGIES made, where it made any."""
    trials = [trial for trial in state.trials() if trial.k == count]
    found = [[trial for trial in trials if trial.strategy == strategy] for strategy in STRATEGIES]
    return [rows for rows in found if rows]


def candidates(state: Search, recipe: Recipe, recalled: dict[int, Placement]) -> list[Candidate]:
    """Every placement of the table, those of one K together.

    Args:
        recalled: by K, what the search that minds retrieval found.
    """
    layers, found = state.space.num_layers, []
    names = [name for name in state.space.names if kind_of(name) != "A"]
    for count in recipe.counts:
        if count == layers:
            found.append(Candidate(count, TEACHER, state.space.original, weights=TEACHER))
            continue
        even = frozenset(i for i, name in enumerate(uniform_placement(layers, count, "W")) if name == "A")
        found.append(Candidate(count, UNIFORM, state.with_full(even)))
        for name in names:
            found.append(Candidate(count, UNIFORM, state.space.with_full_attention((name,) * layers, even), name))
        if count == 0:
            continue
        for seed in range(recipe.seeds):
            drawn = frozenset(random.Random(f"{recipe.seed}/{seed}/{count}").sample(range(layers), count))
            found.append(Candidate(count, f"random-{seed}", state.with_full(drawn)))
        for mine in _by_strategy(state, count):
            found.append(Candidate(count, mine[0].strategy, best_of(mine).layers))
        if count in recalled:
            found.append(Candidate(count, recall.METHOD, recalled[count]))
    return found


def chosen(bench: Bench, count: int) -> Candidate:
    """The searched placement of K layers that is finalised: the best on the search split, by the recipe's choice."""
    rows = [row for row in bench.plan.candidates if row.k == count and row.weights == "supernet"]
    if not rows:
        raise MachineError(f"no searched placement of {count} full-attention layers yet")
    found = [row for row in rows if row.method in SEARCHED] or rows
    evaluator, placements = bench.supernet_evaluator, [row.placement for row in found]
    judge = None
    if bench.recipe.choose == recall.METHOD:
        judge = _recall(bench, evaluator, bench.shape.parse(bench.plan["base"]))
    if judge is not None:
        shares = judge.shares(placements)
        # What it was chosen from, for whoever wonders.
        bench.plan[f"finalize-{count}-choices"] = [
            {"method": row.method, "placement": format_placement(row.placement), "text": round(text, 4),
             "answers": round(answers, 4)}
            for row in found for text, answers in [shares[row.placement]]
        ]  # fmt: skip
        return min(found, key=lambda row: sum(shares[row.placement]))
    scores = evaluator.divergences(placements)
    return found[min(range(len(found)), key=lambda i: (scores[i].value, i))]
