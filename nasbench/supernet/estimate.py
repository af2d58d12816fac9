"""What a distillation will take, from a few real steps on this device: tokens, steps, memory, time. Writes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nasbench.parallel.fsdp import local
from nasbench.runtime.memory import peak_bytes
from nasbench.runtime.timing import stopwatch
from nasbench.supernet import checkpoint
from nasbench.supernet.loop import LossSums
from nasbench.supernet.train import SOLVE_BATCH_TOKENS, STAGES, Distiller

TIMED_STEPS = 3
STATE_BYTES = 16
"""A trained parameter's in fp32: master, gradient and two moments. One that is shared out is its own master."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a distillation.

    Attributes:
        tokens, steps: that are left to do.
        step_tokens: of a step, over all processes.
        tok_s: measured.
        seconds: that the stage will take.
    """

    stage: str
    tokens: int
    steps: int
    step_tokens: int
    tok_s: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a distillation will take.

    Attributes:
        corpus_tokens: of the training split, to be read again once they are used up.
        trained_parameters: of all alternatives.
        processes: that share the work; bytes are those of this one, of its share where weights are shared out.
        model_bytes: of the teacher's weights.
        training_bytes: of the trained mixers, their masters, gradients and moments.
        peak_bytes: the most that was allocated during the timed steps; on a CPU, that was resident.
    """

    stages: tuple[StageEstimate, ...]
    corpus_tokens: int
    trained_parameters: int
    processes: int
    model_bytes: int
    training_bytes: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


def estimate(distiller: Distiller) -> Estimate:
    """Runs a few steps of every stage that has something left to do. The distiller's supernet is not to be used after.

    Raises as training does: UserError for settings that do not fit the run.
    """
    saved = checkpoint.latest(distiller.run.supernet)
    stage, start = ("align", 0) if saved is None else distiller.resume_point(saved)
    left = {name: distiller.steps(name, distiller.state["cycles"][name][-1]) for name in STAGES}
    trained = distiller.net.trained()
    if stage == "done" or not trained:
        left = dict.fromkeys(STAGES, 0)
    else:
        left[stage] -= start
        left |= dict.fromkeys(STAGES[: STAGES.index(stage)], 0)
    parameters = [parameter for mixer in trained.values() for parameter in mixer.parameters()]
    teacher = list(distiller.net.teacher.parameters())
    stages = []
    solves = (saved is None) + bool(left["align"])
    ridge_tokens = solves * distiller.config.ridge_tokens if distiller.net.closed_form() else 0
    one_batch = max(SOLVE_BATCH_TOKENS.of(distiller.device), distiller.corpus.sequence)
    seconds = stopwatch(distiller.device)(lambda: distiller.prepare(one_batch))
    stages.append(_stage("ridge", ridge_tokens, one_batch, seconds))
    for name in STAGES:
        if left[name]:
            stages.append(_stage(name, left[name] * distiller.step_tokens(name), *time_steps(distiller, name)))
    return Estimate(
        stages=tuple(row for row in stages if row.tokens),
        corpus_tokens=distiller.corpus.train.numel(),
        trained_parameters=sum(parameter.numel() for parameter in parameters),
        processes=distiller.workers.size,
        model_bytes=sum(local(parameter).nbytes for parameter in teacher),
        training_bytes=sum(map(_training_bytes, parameters)),
        peak_bytes=peak_bytes(distiller.device),
    )


def _training_bytes(parameter: Tensor) -> int:
    own = local(parameter)
    return STATE_BYTES * own.numel() + (0 if own is not parameter else own.nbytes)


def _stage(name: str, tokens: int, step_tokens: int, step_seconds: float) -> StageEstimate:
    speed = step_tokens / step_seconds
    return StageEstimate(name, tokens, -(-tokens // step_tokens), step_tokens, speed, tokens / speed)


def time_steps(distiller: Distiller, stage: str) -> tuple[int, float]:
    """(tokens of a step, seconds that it takes), from a few steps that change the distiller's supernet."""
    optimizer = distiller.optimizer(stage)
    sums = LossSums(["", *optimizer.groups], distiller.device)

    def step(index: int) -> None:
        distiller.step(stage, index, optimizer, sums)
        optimizer.apply(1.0)

    step(0)  # warms up, captures a graph

    def steps() -> None:
        for index in range(1, 1 + TIMED_STEPS):
            step(index)

    seconds = stopwatch(distiller.device)(steps)
    distiller.reset_graphs()
    return distiller.step_tokens(stage), seconds / TIMED_STEPS
