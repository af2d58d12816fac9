"""What training takes, by a few timed steps on this device: an estimate, or seconds that become tokens.

runs/NAME/supernet/budget.json       of every stage: tokens of a step, tokens/s, whether CUDA graphs are used, tokens
runs/NAME/final/<slug>/budget.json   of a finalised placement: tokens by seconds, seconds spent, tokens/s

A budget is decided once, so that a run that is stopped continues with the same one. More seconds give more tokens.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nasbench.checkpoints.load import LoadedModel
from nasbench.core.errors import MachineError
from nasbench.core.files import damaged, read_object, write_json
from nasbench.data.packing import Corpus
from nasbench.parallel.fsdp import is_sharded, local
from nasbench.runs import Run
from nasbench.runtime.memory import free_bytes, peak_bytes, ran_out
from nasbench.runtime.timing import stopwatch
from nasbench.supernet import checkpoint
from nasbench.supernet.finalize import final_version
from nasbench.supernet.loop import Notice
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import SOLVE_BATCH_TOKENS, STAGES, Distiller

FILE, HISTORY = "budget.json", "history.json"
GRAPHS_GAIN = 1.05
"""Least speed-up for which layers are replayed from CUDA graphs: they take memory."""
TRUSTED_S = 5.0
"""A finalisation that took less says nothing about the speed of the next."""
TIMED_STEPS = 3
_PLAN: dict[str, Callable[[Any], Any]] = {"batch_tokens": int, "tok_s": float, "seconds": float, "tokens": int}
STATE_BYTES = 16
"""A trained parameter's in fp32: master, gradient and two moments. A sharded one is its own master."""


@dataclass(frozen=True)
class StageEstimate:
    """What is left of one stage of a distillation; tokens are those of all processes."""

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
    """What a distillation will take. Bytes are those of this process, of its shards where weights are sharded.

    Attributes:
        corpus_tokens: of the training split, which is read again once it is used up.
        trained_parameters: of all alternatives.
        training_bytes: of the trained mixers, their masters, gradients and moments.
        peak_bytes: most that was allocated during the timed steps; on a CPU, that was resident.
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
        training_bytes=sum(
            STATE_BYTES * local(parameter).numel() + (0 if is_sharded(parameter) else parameter.nbytes)
            for parameter in parameters
        ),
        peak_bytes=peak_bytes(distiller.device),
    )


def time_steps(distiller: Distiller, name: str) -> tuple[int, float]:
    """(tokens of a step, seconds that it takes), from a few steps that change the distiller's supernet."""
    stage = distiller.stage(name)

    def steps(first: int, last: int) -> None:
        for index in range(first, last):
            stage.gradients(index)
            stage.optimizer.apply(1.0)

    steps(0, 1)  # warms up, captures a graph
    seconds = stopwatch(distiller.device)(lambda: steps(1, 1 + TIMED_STEPS))
    distiller.weights |= stage.optimizer.weights()
    return stage.step_tokens, seconds / TIMED_STEPS


class Budget:
    """Turns seconds into tokens for one run.

    Args:
        loaded, corpus: the run's model, and its text in rows.
    """

    def __init__(
        self, run: Run, config: DistillConfig, loaded: LoadedModel, corpus: Corpus, device: str, log: Notice
    ) -> None:
        self.run, self.config, self.loaded, self.corpus = run, config, loaded, corpus
        self.device, self.log = device, log
        self.path = run.supernet / FILE

    def settings(self, seconds: dict[str, float], most: dict[str, int] | None = None) -> DistillConfig:
        """The settings with the steps and the tokens that fill the seconds of each stage; 0 leaves a stage as it is.

        Args:
            most: tokens of stages beyond which their seconds buy no more.
        """
        changes: dict[str, Any] = {}
        for stage in (name for name, value in seconds.items() if value):
            known = self.stage(stage, seconds[stage])
            tokens = min(int(known["tokens"]), (most or {}).get(stage, int(known["tokens"])))
            if most and tokens < most.get(stage, 0):
                self.log(
                    f"{stage}: {seconds[stage]:.0f} s leave out {most[stage] - tokens:,} of {most[stage]:,} tokens"
                )
            changes |= {f"{stage}_tokens": tokens, f"{stage}_batch_tokens": int(known["batch_tokens"])}
            if stage == "supernet":
                changes["graphs"] = bool(known["graphs"])
        return self.config.updated(changes)

    def stage(self, stage: str, seconds: float) -> dict[str, Any]:
        """The budget of a training stage: step, tokens/s and tokens. Times steps where none were timed before."""
        plans = read_object(self.path)
        known = plans.get(stage) or {**self._largest_step(stage), "seconds": 0.0, "tokens": 0}
        with damaged(self.path):
            known = {**known, **{name: kind(known[name]) for name, kind in _PLAN.items()}}
            if seconds > known["seconds"]:
                steps = max(1, int(seconds * known["tok_s"] / known["batch_tokens"]))
                known = {**known, "seconds": seconds, "tokens": steps * known["batch_tokens"]}
        write_json(self.path, {**plans, stage: known})
        self.log(
            f"{stage}: {known['tokens']:,} tokens in steps of {known['batch_tokens']:,}, {known['tok_s']:,.0f} tokens/s"
        )
        return dict(known)

    def _largest_step(self, stage: str) -> dict[str, Any]:
        """The largest step up to the settings' that fits; batches are halved until one does. On a GPU, sub-networks
        are also timed from CUDA graphs, which are faster where the host launches more slowly than the GPU computes."""
        size = getattr(self.config, f"{stage}_batch_tokens")
        while (found := self._timed_step(stage, {f"{stage}_batch_tokens": size})) is None:
            if size <= self.run.spec.sequence:
                raise MachineError(f"not one row of {self.run.spec.sequence} tokens fits into a step of {stage}")
            size //= 2
        if stage == "align" or not self.device.startswith("cuda") or self.config.graphs or self.config.recompute:
            return found
        # A step keeps the activations of one kind in each layer, graphs those of all kinds; finalising whole layers
        # takes up to one more. Memory that runs out within a capture breaks torch's allocator: so never try.
        needed = found["peak_bytes"] * (1 + len(self.run.spec.names))
        if needed > free_bytes(self.device):
            self.log(f"{stage}: graphs would take {needed / 2**30:,.0f} GiB")
            return found
        replayed = self._timed_step(stage, {f"{stage}_batch_tokens": size, "graphs": True})
        told = "do not fit" if replayed is None else f"{replayed['tok_s']:,.0f} tokens/s"
        self.log(f"{stage}: {found['tok_s']:,.0f} tokens/s; from graphs: {told}")
        return replayed if replayed is not None and replayed["tok_s"] > GRAPHS_GAIN * found["tok_s"] else found

    def _timed_step(self, stage: str, changes: dict[str, Any]) -> dict[str, Any] | None:
        """Tokens, tokens/s and memory of a stage's steps with changed settings; None where they do not fit."""
        config, device = self.config.updated(changes), torch.device(self.device)
        found: dict[str, Any] | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            distiller = Distiller(self.run, self.loaded, config, threading.Event(), corpus=self.corpus)
            distiller.prepare(0)
            tokens, seconds = time_steps(distiller, stage)
            peak = peak_bytes(device)
            found = {"batch_tokens": tokens, "tok_s": tokens / seconds, "graphs": config.graphs, "peak_bytes": peak}
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        # Outside of the handler: the exception holds the frames, and the frames hold the tensors.
        distiller = None  # type: ignore[assignment]
        release_memory(self.device)
        return found


def release_memory(device: str) -> None:
    """Gives memory back that captured graphs and their tensors held."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


class FinalBudget:
    """The budget of finalising one placement, across several calls with growing seconds.

    Args:
        version: of the supernet that the finalisation begins from; another one starts anew.
        tok_s, step: of the supernet's training, and tokens of a step.
    """

    def __init__(self, folder: Path, version: str, tok_s: float, step: int) -> None:
        self.path, self.step = folder / FILE, step
        data = read_object(self.path)
        fresh = {"supernet": version, "spent": 0.0, "tok_s": tok_s, "tokens": {}, "done": 0}
        with damaged(self.path):
            own = {"spent": float, "tok_s": float, "done": int}
            tokens = {f"{float(at):g}": int(count) for at, count in data.get("tokens", {}).items()}
            read = {**data, **{name: kind(data.get(name, fresh[name])) for name, kind in own.items()}, "tokens": tokens}
        self.data: dict[str, Any] = read if data.get("supernet") == version else fresh

    def tokens(self, seconds: float) -> int:
        """Tokens in all that fill so many seconds in all, at least one step more than those of less time."""
        key = f"{seconds:g}"
        if key not in self.data["tokens"]:
            earlier = max((tokens for at, tokens in self.data["tokens"].items() if float(at) < seconds), default=0)
            left = max(0.0, seconds - self.data["spent"])
            self.data["tokens"][key] = earlier + max(1, int(left * self.data["tok_s"] / self.step)) * self.step
            write_json(self.path, self.data)
        return int(self.data["tokens"][key])

    def timed(self, tokens: int, work: Callable[[], Path]) -> None:
        """Runs the training of so many tokens, unless it has gone on to more. Counts its time, also when it is stopped:
        without it the device would seem faster than it is."""
        if self.data["done"] >= tokens:
            return
        began = time.monotonic()
        try:
            work()
            self.data["done"] = tokens
        finally:
            self.data["spent"] = round(self.data["spent"] + time.monotonic() - began, 1)
            if self.data["done"] == tokens and self.data["spent"] > TRUSTED_S:
                self.data["tok_s"] = tokens / self.data["spent"]
            write_json(self.path, self.data)


def final_history(folder: Path) -> dict[str, int]:
    """Version of the weights -> tokens of finalising, of everything that a finalised folder has held."""
    path = folder / HISTORY
    with damaged(path):
        return {str(version): int(tokens) for version, tokens in read_object(path).items()}


def note_final(folder: Path, tokens: int) -> None:
    """Keeps which weights a folder holds after so many tokens: scores of earlier weights make a learning curve."""
    write_json(folder / HISTORY, {**final_history(folder), final_version(folder): tokens})
