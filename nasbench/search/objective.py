"""What a search asks of the world: how accurate placements are, and how fast on the target.

An objective is a task, or a weighted mix of tasks: `kl`, `retrieval@512`, `kl+0.5*retrieval-kl@2k:64`. A search
minimises its score: nats, or 1 - accuracy. Each term of a mix is a share: what the placement loses against the model
itself, over what the best placement with one kind in all layers loses. An objective may also be a cost, as
`decode_tok_s@h200,64k,max` (nasbench.search.limits): its score is the share of the model's own.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nasbench.core.errors import UserError
from nasbench.core.sizes import format_size
from nasbench.search.limits import METRICS, Costs, Limit, Workload, parse_workload
from nasbench.search.racing import first_look, race
from nasbench.search.trials import Target
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import Space

if TYPE_CHECKING:
    from nasbench.cost import CostModel
    from nasbench.evaluation.evaluator import Evaluator
    from nasbench.evaluation.scores import Scores
    from nasbench.evaluation.tasks import Task

TEXT = ("loss", "kl")
"""Objectives over text alone. Layers are then told apart by the KL divergence, which has far less noise than the loss
on the same few thousand tokens: how hard the text itself is cancels."""
_NEXT_TERM = re.compile(r"\s*\+\s*(?=(?:[\d.]+\*)?[a-z])")
log = logging.getLogger("nasbench")


@dataclass(frozen=True)
class Measured:
    """The score that placements are ranked by, lower is better, and what every search measures beside it: mean loss of
    a token in nats, its standard error, KL divergence from the teacher. `excess`: by how much of their bounds it misses
    limits on tasks."""

    score: float
    loss: float
    loss_stderr: float = math.nan
    kl: float = math.nan
    excess: float = 0.0


@dataclass(frozen=True)
class Speed:
    """What the cost model says of a placement on the target. `prefill_tok_s` is NaN where it is not measured."""

    decode_tok_s: float
    prefill_tok_s: float
    step_ms: float
    cache_bytes: int
    source: str


def parse_objective(text: str) -> list[tuple[float, Task]]:
    """`kl+0.5*retrieval@512` -> weights and tasks. Raises UserError."""
    from nasbench.evaluation.tasks import parse_task

    terms = []
    for part in _NEXT_TERM.split(text.strip()):
        weight, star, task = part.strip().rpartition("*") if re.match(r"[\d.]+\*", part.strip()) else ("", "", part)
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"bad weight {weight!r} in objective {text!r}: write kl+0.5*retrieval@512")
        terms.append((value, parse_task(task)))
    return terms


def parse_goal(text: str, target: Target, db: Path | None = None) -> tuple[str, Workload] | None:
    """`decode_tok_s@h200,64k,max` -> the cost and its workload; None for an objective of tasks. Raises UserError."""
    name, _, place = text.partition("@")
    return (name, parse_workload(place, name, target, db)) if name in METRICS else None


def distinct_space(evaluator: Evaluator, tasks: Sequence[Task], context_tokens: int = 0) -> Space:
    """The evaluator's space without the names that no task can tell from full attention.

    A window at least as long as every scored text is full attention on it: its score would be the teacher's.

    Args:
        context_tokens: of the target; shorter scored texts are said.

    Raises UserError where no alternative is left.
    """
    shape, space, context = evaluator.supernet.teacher.shape, evaluator.supernet.space, evaluator.context("search")
    longest = max(task.scored_tokens(context) for task in tasks)
    if longest < context_tokens:
        log.warning(
            "scores are of texts of %d tokens, the target's context has %d: ruler@%s in --objective scores what only "
            "long texts need", longest, context_tokens, format_size(min(context_tokens, shape.max_context)),
        )  # fmt: skip
    exact = {name: shape.mixer(name, at).exact_until for name in space.efficient_names for at in space.may_be_full[:1]}
    names = [name for name, until in exact.items() if until >= longest]
    near = [name for name, until in exact.items() if longest / 2 < until < longest]
    if near:
        log.warning(
            "%s differ from full attention only in the last part of scored texts of %d tokens: score on texts of twice "
            "their window to tell them apart", ", ".join(near), longest,
        )  # fmt: skip
    if not names:
        return space
    told = (
        f"{', '.join(names)} cannot be told from full attention on scored text of {longest} tokens: the window is as "
        "long. Distil and search with longer --sequence, or choose an --objective over longer text"
    )
    left = space.without(names)
    if not any(left.alternatives(layer) for layer in range(left.num_layers)):
        raise UserError(told)
    log.warning("left out of the search: %s", told)
    return left


class RunObjective:
    """The objective of a run folder: scores of its supernet, and the speed of a target. Deterministic.

    Args:
        speed: of a placement on the target.
        text: the objective, as written to --objective.
        costs: predicted costs of any workload; they are needed for limits on costs, and for a cost as the objective.
        limits: the search's; those on tasks are measured here.
        progress: called with (what, done, total) while the layers' importance is measured.

    Attributes:
        space: what the objective can tell apart.
        version, settings, dtype: of the weights, the text of loss and KL, and the evaluation. Scores of other ones are
            never compared.
        store: where the scores are kept.
        raced: placements of all races, those that were stopped, rows of text of all placements, rows that were read.
        reference: of the hypervolume: a score worse than those of interest.

    Raises:
        UserError: a bad objective, or a space of which it can tell nothing apart.
    """

    def __init__(
        self,
        target: Target,
        evaluator: Evaluator,
        speed: Callable[[Placement], Speed],
        text: str = "kl",
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        costs: Costs | None = None,
        limits: Sequence[Limit] = (),
    ) -> None:
        from nasbench.evaluation.tasks import parse_task

        self.target, self.text, self.costs = target, text, costs
        self.goal = parse_goal(text, target, costs.db) if costs else None
        self.terms = [] if self.goal else parse_objective(text)
        self.task_limits = [(limit, parse_task(limit.metric)) for limit in limits if limit.workload is None]
        self.version, self.dtype, self.store = evaluator.supernet.version, evaluator.dtype, evaluator.store
        context = evaluator.context("search")
        tasks = [task for _, task in (*self.terms, *self.task_limits)]
        for task in tasks:
            task.check(context)
        self.settings = parse_task("kl").settings(context)
        self.space = distinct_space(evaluator, tasks or [parse_task("kl")], target.context)
        if self.goal or self.mixed:
            self.reference = 2.0 * (sum(weight for weight, _ in self.terms) or 1.0)
        else:
            vocabulary = math.log(evaluator.supernet.teacher.shape.vocab_size)
            self.reference = 1.0 if self.terms[0][1].higher_is_better else vocabulary
        self._evaluator, self._speed, self._progress = evaluator, speed, progress
        self._speeds: dict[Placement, Speed] = {}
        self._scales: list[tuple[float, float]] = []
        self.raced = np.zeros(4, dtype=np.int64)

    @property
    def mixed(self) -> bool:
        return len(self.terms) > 1

    def measure(self, placements: Sequence[Placement]) -> list[Measured]:
        """On the search split. The expensive one: many placements in one call share work."""
        tasks = list(dict.fromkeys([*TEXT, *(task.label for _, task in (*self.terms, *self.task_limits))]))
        found = self._evaluator.measure(list(placements), "search", tasks=tasks)
        return [
            Measured(
                self._score(placement, scores), scores["loss"].value, scores["loss"].stderr, scores["kl"].value,
                sum(limit.excess(scores[task.label].value) for limit, task in self.task_limits),
            )
            for placement, scores in zip(placements, found, strict=True)
        ]  # fmt: skip

    def _score(self, placement: Placement, scores: Mapping[str, Scores]) -> float:
        if self.goal and self.costs:
            (metric, at), value = self.goal, self.costs.value
            share = value(metric, at, placement) / value(metric, at, self.space.original)
            return 1 / share if METRICS[metric].more else share
        costs = [scores[task.label].cost for _, task in self.terms]
        if not self.mixed:
            return costs[0]
        self._scales = self._scales or self._measure_scales()
        shares = [(cost - zero) / whole for cost, (zero, whole) in zip(costs, self._scales, strict=True)]
        return sum(weight * share for (weight, _), share in zip(self.terms, shares, strict=True))

    def _measure_scales(self) -> list[tuple[float, float]]:
        """Of every term: the model's own cost, and what the best placement of one kind loses. Infinite where it loses
        nothing: the term then says nothing."""
        pure = [self.space.homogeneous(name) for name in self.space.efficient_names]
        tasks = [task for _, task in self.terms]
        model, *others = self._evaluator.measure([self.space.original, *pure], "search", tasks=tasks)
        scales = []
        for task in tasks:
            zero = model[task.label].cost
            whole = min(scores[task.label].cost for scores in others) - zero
            if whole <= 0:
                log.warning(
                    "%s says nothing in objective %s: a placement of one kind loses nothing", task.label, self.text
                )
            scales.append((zero, whole if whole > 0 else math.inf))
        if all(math.isinf(whole) for _, whole in scales):
            raise UserError(f"objective {self.text} tells no placements apart: choose another")
        return scales

    def scaled_terms(self) -> list[tuple[float, float, Task]]:
        """(weight, what a share of 1 is, task) of every term; none where the objective is a cost."""
        scales = self._scales if self.mixed else [(0.0, 1.0)]
        return [(weight, whole, task) for (weight, task), (_, whole) in zip(self.terms, scales, strict=False)]

    def speed(self, placement: Placement) -> Speed:
        """On the target. Cheap."""
        if placement not in self._speeds:
            self._speeds[placement] = self._speed(placement)
        return self._speeds[placement]

    def importance(self, names: Sequence[str], by_score: bool = False) -> Mapping[tuple[int, str], float]:
        """What putting each of the names in one layer of the otherwise unchanged model costs: KL on text, which takes
        little time, or the objective's own score."""
        from nasbench.evaluation.importance import layer_importance

        def progress(done: int, total: int) -> None:
            self._progress("layer importance", done, total)

        rows = layer_importance(self._evaluator, names, progress)
        if self.text in TEXT or not by_score:
            return {(row.layer, row.name): row.kl for row in rows}
        keys = [(row.layer, row.name) for row in rows]
        return self._singles(keys, lambda found: [one.score for one in self.measure(found)])[1]

    def race(self, placements: Sequence[Placement], keep: int) -> dict[Placement, tuple[Placement, float]]:
        """Those that are clearly not among the best `keep` by the first rows of the text, each with the last of these
        and the gap to it. None where the text is short, or the objective is more than a task over it."""
        corpus, tokens = self._evaluator.corpus, self._evaluator.tokens["search"]
        total = len(corpus.held_out("search", tokens).tokens)
        look = first_look(total) if self.text in TEXT else 0
        if not look:
            return {}
        rows = self._evaluator.first_rows(placements, self.text, look)
        rival, gaps = race(rows, total, keep)
        found = {p: (placements[rival], float(gap)) for p, gap in zip(placements, gaps, strict=True) if gap > 0}
        self.raced += np.array([len(placements), len(found), len(placements) * total, look * len(placements)])
        self.raced[3] += (len(placements) - len(found)) * total
        return found

    def gates(
        self, base: Placement, start: Sequence[float], counts: Sequence[int], steps: int, seed: int
    ) -> dict[int, list[float]]:
        """How much full attention every layer gets beside its replacement in `base`, for each K, as learnt by KL on
        training text: see nasbench.evaluation.gates."""
        from nasbench.evaluation.gates import learn_gates, supernet_loss

        self._progress("gates", 0, steps)
        loss, device = supernet_loss(self._evaluator, base, seed), self._evaluator.supernet.teacher.device
        return learn_gates(loss, start, self.space.may_be_full, counts, steps, device)

    def task_changes(self, limit: Limit, names: Sequence[str]) -> tuple[float, dict[tuple[int, str], float]]:
        """(a task's value for the model, how it changes with each (layer, name) alone)."""
        keys = [(i, name) for i, own in enumerate(self.space.choices) for name in own[1:] if name in names]
        label = limit.metric

        def values(placements: Sequence[Placement]) -> list[float]:
            found = self._evaluator.measure(placements, "search", tasks=[label])
            return [scores[label].value for scores in found]

        return self._singles(keys, values)

    def _singles(
        self, keys: Sequence[tuple[int, str]], values: Callable[[list[Placement]], list[float]]
    ) -> tuple[float, dict[tuple[int, str], float]]:
        """(value of the model, how it changes where one layer has another name)."""
        own = self.space.original
        base, *found = values([own, *((*own[:layer], name, *own[layer + 1 :]) for layer, name in keys)])
        return base, {key: value - base for key, value in zip(keys, found, strict=True)}


def model_speed(cost: CostModel, target: Target) -> Callable[[Placement], Speed]:
    """The cost model's word on a placement at the target's context and batch."""

    def speed(placement: Placement) -> Speed:
        found = cost.cost(placement, target.context, target.batch)
        assert found.decode_tok_s is not None, "CostModel.cost has rows or raises"
        assert found.step_ms is not None
        prefill = math.nan if found.prefill_tok_s is None else found.prefill_tok_s
        return Speed(found.decode_tok_s, prefill, found.step_ms, found.cache_bytes, found.source)

    return speed
