"""An Optuna study of the objective against tokens/s, in a storage that resumes and that many workers can share.

A trial is one category a layer; NSGA-II combines placements layer by layer. Where K is given, a trial with another
number of full layers is repaired: the least (or most) important layers change until a wanted K is met, so that no
evaluation goes to a placement that was not asked for. The study starts from every trial that the run already has.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nasbench.core.errors import UserError
from nasbench.search.session import STRATEGIES, Session
from nasbench.search.storage import open_study
from nasbench.search.trials import best_of, front_rows
from nasbench.search.workers import POLL_S, Team
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import full_layers, is_full

if TYPE_CHECKING:
    import optuna

NAME, TPE, GP, NSGA3 = "optuna", "optuna-tpe", "optuna-gp", "optuna-nsga3"
"""Strategies by sampler: NSGA-II, the tree-structured Parzen estimator, a Gaussian process, NSGA-III."""
POPULATION = 24
ROUND = 8
"""Trials that are asked at once."""
PATIENCE = 10
"""Rounds without a placement that was not seen before, after which the study ends: the sampler has converged."""


def _layer(index: int) -> str:
    return f"layer_{index:03d}"


def distributions(search: Session) -> dict[str, optuna.distributions.BaseDistribution]:
    """One categorical a layer: its original and its replacements."""
    from optuna.distributions import CategoricalDistribution

    return {
        _layer(index): CategoricalDistribution(tuple(dict.fromkeys((own, *search.replacements(index)))))
        for index, own in enumerate(search.space.original)
    }


def decode(search: Session, names: Placement) -> Placement:
    """The placement that a trial's names stand for: itself, or the nearest one with a wanted K. Where limits decide on
    K, the least important layers give up full attention until a placement keeps to them."""
    counts = search.options.full_attention
    full = set(full_layers(names))
    if len(full) in (counts or (len(full),)) and (counts or search.keeps(names)):
        return names
    by_importance = sorted(search.space.may_be_full, key=lambda layer: (search.layer_importance[layer], layer))
    others = tuple(search.base[layer] if is_full(name) else name for layer, name in enumerate(names))
    wanted = min(counts, key=lambda count: (abs(count - len(full)), count)) if counts else 0

    def placed() -> Placement:
        return search.space.with_full_attention(others, frozenset(full))

    while len(full) > wanted and (counts or not search.keeps(placed())):
        full.remove(next(layer for layer in by_importance if layer in full))
    while len(full) < wanted:
        full.add(next(layer for layer in reversed(by_importance) if layer not in full))
    return placed()


def sampler_of(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of a strategy. Raises UserError for one whose package is missing."""
    from optuna import samplers

    if name == GP:
        if find_spec("scipy") is None:
            raise UserError(f"strategy {GP} needs scipy: pip install scipy")
        return samplers.GPSampler(seed=seed)
    if name == TPE:
        return samplers.TPESampler(seed=seed, multivariate=True)
    genetic = samplers.NSGAIIISampler if name == NSGA3 else samplers.NSGAIISampler
    return genetic(population_size=POPULATION, seed=seed)


def team_of(search: Session, strategy: str) -> Team:
    """The workers on the study of this target, these weights and this space. Raises as `open_study`."""
    options, objective = search.options, search.objective
    scored = objective.text, objective.settings, objective.dtype, objective.version
    limits = tuple(map(str, options.limits))
    wanted = options.full_attention, search.faster, limits
    identity = repr((strategy, "claims", *scored, objective.target, search.space, *wanted))
    name = f"nasbench-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    study = open_study(name, options.storage, search.folder / "optuna.journal")
    # The seed moves with the trials that are there, so that a study that goes on does not repeat itself, and workers
    # that start at once do not ask the same.
    seed = options.seed + len(study.get_trials(deepcopy=False)) + (os.getpid() if options.worker else 0)
    return Team(study, sampler_of(strategy, seed), distributions(search), options.evaluations)


def seeds(search: Session) -> list[Placement]:
    """Placements that the study starts from: the front of all trials so far, and the best of every wanted K."""
    trials = search.trials()
    best = [row.layers for row in front_rows(trials, search.objective.reference)]
    for count in search.options.full_attention:
        best.extend(search.evenly_spread(count))
        mine = [trial for trial in trials if trial.k == count]
        best.extend([best_of(mine).layers] if mine else [])
    legal = [{name, *search.replacements(layer)} for layer, name in enumerate(search.space.original)]
    usable = [p for p in dict.fromkeys(best) if all(name in names for name, names in zip(p, legal, strict=True))]
    return usable[:POPULATION]


def optuna_study(search: Session, strategy: str = NAME) -> None:
    """The strategy: asks a round of trials, evaluates those that no other worker does, tells their score and speed."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        team = team_of(search, strategy)
    study, space = team.study, team.space
    for placement in seeds(search):
        study.enqueue_trial(team.names(placement), skip_if_exists=True)
    idle = 0
    while len(team.copy()) < team.budget and idle < PATIENCE:
        team.reclaim()
        if team.busy():
            time.sleep(POLL_S)  # for the others, who may die
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            asked = [study.ask(fixed_distributions=space) for _ in range(ROUND)]
        claimed: dict[Placement, tuple[optuna.Trial, int]] = {}
        for trial in asked:
            placement = decode(search, tuple(trial.params[name] for name in space))
            number = team.claim(trial, placement) if search.keeps(placement) else None
            if number is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                claimed[placement] = trial, number
        for placement, score in search.evaluate(claimed, strategy).items():
            team.finish(*claimed[placement], (score, search.objective.speed(placement).decode_tok_s))
        idle = 0 if claimed else idle + 1
    search.evaluate(sorted(team.done), strategy)


for _name in (NAME, TPE, GP, NSGA3):
    STRATEGIES.register(_name, partial(optuna_study, strategy=_name))
