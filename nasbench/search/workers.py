"""How the workers of a study share it: who evaluates what, and what becomes of a dead worker's trials.

Every worker samples from a copy of the study in its memory. What it wants to evaluate it adds to the shared study as a
running trial, in one write: the placement, and who claims it. It may evaluate the trial if no earlier one, by number,
has the same placement, and if earlier ones leave some of the budget. All workers judge by the same numbers, so that no
placement is evaluated twice and the budget is kept.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.spaces.placement import Placement, format_placement, parse_placement

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

POLL_S = 0.05
LEASE_S = 3600.0
"""Time for a trial on another host, whose processes cannot be seen."""
CLAIM = "claim"
"""A trial's attribute: [its placement, HOST:PROCESS:START:SEARCH of the worker, when it was claimed]."""


class Team:
    """The workers of a study, as one of them sees it.

    Args:
        shared: the study in its storage.
        sampler: of this worker.
        space: distribution of every parameter.
        budget: placements that all workers together evaluate.

    Attributes:
        study: this worker's copy, to ask.
    """

    def __init__(
        self,
        shared: optuna.Study,
        sampler: optuna.samplers.BaseSampler,
        space: dict[str, optuna.distributions.BaseDistribution],
        budget: int,
    ) -> None:
        import optuna

        self.shared, self.space, self.budget = shared, space, budget
        self.study = optuna.create_study(directions=shared.directions, sampler=sampler)
        self.me = f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}:{time.time_ns()}"
        self._copied: set[int] = set()
        self.done = self.copy()

    def copy(self) -> set[Placement]:
        """Copies what other workers have finished; returns every placement that was evaluated."""
        import optuna

        finished = self._trials("COMPLETE")
        for trial in finished:
            if trial.number not in self._copied:
                self._copied.add(trial.number)
                self.study.add_trial(
                    optuna.create_trial(
                        values=trial.values, params=self.names(_placement(trial)), distributions=self.space,
                        system_attrs=trial.system_attrs,
                    )
                )  # fmt: skip
        self.done = set(map(_placement, finished))
        return self.done

    def names(self, placement: Placement) -> dict[str, str]:
        """The parameters of a placement in this worker's study."""
        return dict(zip(self.space, placement, strict=True))

    def busy(self) -> bool:
        """Whether others, who are alive, evaluate all that is left of the budget."""
        return len(self._taken()) >= self.budget

    def claim(self, trial: optuna.Trial, placement: Placement) -> int | None:
        """Claims a placement for an asked trial. Returns its number in the shared study; None where somebody else
        evaluates it, or nothing is left of the budget."""
        import optuna

        if placement in self._taken():
            return None
        asked = self.study.trials[trial.number]
        claim = [format_placement(placement), self.me, time.time_ns()]
        # Parameters are left out: a database takes a query for each.
        state, notes = optuna.trial.TrialState.RUNNING, asked.system_attrs
        self.shared.add_trial(optuna.create_trial(state=state, user_attrs={CLAIM: claim}, system_attrs=notes))
        mine = next(t for t in reversed(self._trials("RUNNING")) if t.user_attrs[CLAIM] == claim)
        taken = self._taken(mine.number)
        if placement in taken or len(taken) >= self.budget:
            self.shared.tell(mine.number, state=optuna.trial.TrialState.FAIL)
            return None
        return mine.number

    def finish(self, trial: optuna.Trial, number: int, values: tuple[float, float]) -> None:
        """Tells what a claimed trial gave."""
        self.shared.tell(number, values)
        self._copied.add(number)
        self.study.tell(trial, values)

    def reclaim(self) -> None:
        """Asks the trials of dead workers again."""
        import optuna

        for trial in self._trials("RUNNING"):
            if not self._alive(trial):
                try:
                    self.shared.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                except (ValueError, RuntimeError):
                    continue  # another worker saw it first
                self.study.enqueue_trial(self.names(_placement(trial)))

    def _taken(self, before: int | None = None) -> set[Placement]:
        """Placements that are evaluated, or are being so by somebody alive, in trials with lower numbers."""
        trials = [t for t in self._trials("COMPLETE", "RUNNING") if before is None or t.number < before]
        return {_placement(t) for t in trials if t.state.name == "COMPLETE" or self._alive(t)}

    def _trials(self, *states: str) -> list[FrozenTrial]:
        import optuna

        wanted = tuple(optuna.trial.TrialState[state] for state in states)
        return self.shared.get_trials(deepcopy=False, states=wanted)

    def _alive(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial lives."""
        worker = trial.user_attrs[CLAIM][1]
        host, process, started, _ = worker.split(":")
        if host != socket.gethostname():
            age = datetime.now() - (trial.datetime_start or datetime.min)
            return age.total_seconds() < LEASE_S
        # An earlier search of this process, which was interrupted, is dead as well.
        return worker == self.me if int(process) == os.getpid() else _started(int(process)) == started


def _placement(trial: FrozenTrial) -> Placement:
    return parse_placement(trial.user_attrs[CLAIM][0])


def _started(process: int) -> str:
    """When a process of this host started, in its own units; "" for a dead one."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
