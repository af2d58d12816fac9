"""An Optuna study of the objective against tokens/s, in a storage that resumes and that many workers can share.

A trial is one category a layer; NSGA-II combines placements layer by layer. Where K is given, a trial with another
number of full layers is repaired: the least (or most) important layers change until a wanted K is met, so that no
evaluation goes to a placement that was not asked for. The study starts from every trial that the run already has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.errors import MachineError, UserError
from nasbench.search.session import BATCH, STRATEGIES, Session
from nasbench.search.trials import best_of, front_rows
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import full_layers, is_full

if TYPE_CHECKING:
    import optuna
    from optuna.storages.journal import JournalFileBackend

NAME = "optuna"
POPULATION = 24
log = logging.getLogger("nasbench")
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


def open_study(search: Session) -> optuna.Study:
    """The study of this target, these weights and this space: opened again if the storage has it.

    Raises UserError for a storage that cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options, objective = search.options, search.objective
    scored = objective.text, objective.settings, objective.dtype, objective.version
    identity = repr((*scored, objective.target, search.space, options.full_attention, search.faster))
    name = f"nasbench-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    try:
        if options.storage:
            storage = optuna.storages.get_storage(options.storage)
        else:
            storage = optuna.storages.JournalStorage(_whole_journal(search.folder / "optuna.journal"))
        study = optuna.create_study(
            study_name=name, storage=storage, directions=["minimize", "maximize"], load_if_exists=True
        )
        # The seed moves with the trials that are there, so that a study that goes on does not repeat itself.
        seed = options.seed + len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    except OSError as error:
        raise MachineError(f"Optuna storage of {search.folder}: {error.strerror or error}") from error
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"Optuna storage {options.storage or 'optuna.journal'!r} does not open: {first}") from error
    return study


def _whole_journal(path: Path) -> JournalFileBackend:
    """A journal file, cut back before the first line that a killed worker left torn. Later lines rest on it: trials are
    numbered by the lines before them."""
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = 0
        for number, line in enumerate(lines, 1):
            if not _is_record(line):
                log.warning("%s: cut back before line %d of %d, which is torn", path, number, len(lines))
                os.truncate(path, whole)
                break
            whole += len(line)
    finally:
        lock.release()
    return JournalFileBackend(str(path), lock)


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


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


def optuna_study(search: Session) -> None:
    """The strategy: asks a batch of trials, evaluates the placements, tells their score and speed."""
    import optuna

    study, space = open_study(search), distributions(search)
    for placement in seeds(search):
        names = {_layer(layer): name for layer, name in enumerate(placement)}
        study.enqueue_trial(names, skip_if_exists=True)
    earlier = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    done = {decode(search, tuple(trial.params[name] for name in space)) for trial in earlier}
    search.evaluate(sorted(done), NAME)
    idle = 0
    while search.remaining(NAME) > 0 and idle < PATIENCE:
        before = search.remaining(NAME)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            trials = [study.ask(fixed_distributions=space) for _ in range(BATCH)]
        placements = [decode(search, tuple(trial.params[name] for name in space)) for trial in trials]
        losses = search.evaluate(placements, NAME)
        for trial, placement in zip(trials, placements, strict=True):
            if placement in losses:
                study.tell(trial, (losses[placement], search.objective.speed(placement).decode_tok_s))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        idle = idle + 1 if search.remaining(NAME) == before else 0


STRATEGIES.register(NAME, optuna_study)
