"""What a distillation will take, from a few real steps on this device: tokens, steps, memory, time. Writes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nasbench.parallel.fsdp import local
from nasbench.runtime.memory import peak_bytes
from nasbench.runtime.timing import stopwatch
from nasbench.supernet import checkpoint
from nasbench.supernet.train import SOLVE_BATCH_TOKENS, STAGES, Distiller

TIMED_STEPS = 3
STATE_BYTES = 16
"""A trained parameter's in fp32: master, gradient and two moments. One that is shared out is its own master."""


@dataclass(frozen=True)
class StageEstimate:
    """What is left of one stage of a distillation. A step's tokens are those of all processes."""

    stage: str
    tokens: int
    steps: int
    step_tokens: int
    tok_s: float
    seconds: float

    @classmethod
    def of(cls, stage: str, tokens: int, step_tokens: int, step_seconds: float) -> StageEstimate:
        speed = step_tokens / step_seconds
        return cls(stage, tokens, -(-tokens // step_tokens), step_tokens, speed, tokens / speed)


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
    config, net = distiller.config, distiller.net
    saved = checkpoint.latest(distiller.run.supernet)
    stage, start = ("align", 0) if saved is None else distiller.resume_point(saved)
    left = dict.fromkeys(STAGES, 0)
    if stage != "done" and net.trained():
        for name in STAGES[STAGES.index(stage) :]:
            left[name] = distiller.steps(name, distiller.state["cycles"][name][-1])
        left[stage] -= start
    solves = (saved is None) + bool(left["align"])
    one_batch = max(SOLVE_BATCH_TOKENS.of(distiller.device), distiller.corpus.sequence)
    seconds = stopwatch(distiller.device)(lambda: distiller.prepare(one_batch))
    ridge_tokens = solves * config.ridge_tokens if net.closed_form() else 0
    stages = [StageEstimate.of("ridge", ridge_tokens, one_batch, seconds)]
    for name, steps in left.items():
        if steps:
            step_tokens, step_seconds = time_steps(distiller, name)
            stages.append(StageEstimate.of(name, steps * step_tokens, step_tokens, step_seconds))
    parameters = [parameter for mixer in net.trained().values() for parameter in mixer.parameters()]
    return Estimate(
        stages=tuple(row for row in stages if row.tokens),
        corpus_tokens=distiller.corpus.train.numel(),
        trained_parameters=sum(parameter.numel() for parameter in parameters),
        processes=distiller.workers.size,
        model_bytes=sum(local(parameter).nbytes for parameter in net.teacher.parameters()),
        training_bytes=sum(map(_training_bytes, parameters)),
        peak_bytes=peak_bytes(distiller.device),
    )


def _training_bytes(parameter: Tensor) -> int:
    own = local(parameter)
    return STATE_BYTES * own.numel() + (0 if own is not parameter else own.nbytes)


def time_steps(distiller: Distiller, name: str) -> tuple[int, float]:
    """(tokens of a step, seconds that it takes), from a few steps that change the distiller's supernet."""
    stage = distiller.stage(name)

    def steps(first: int, last: int) -> None:
        for index in range(first, last):
            stage.gradients(index)
            stage.optimizer.apply(1.0)

    steps(0, 1)  # warms up, captures a graph
    seconds = stopwatch(distiller.device)(lambda: steps(1, 1 + TIMED_STEPS))
    return stage.step_tokens, seconds / TIMED_STEPS
