"""The resumable loop under every training stage: steps, losses.csv, checkpoints, a clean stop on Ctrl-C.

A checkpoint holds the master weights, the optimiser's moments, the step and the unlogged sums of losses; batches and
sampled sub-networks are functions of the step. So a run that is stopped anywhere and started again goes through the
same numbers as one that is not.
"""

from __future__ import annotations

import csv
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nasbench.engine.graph import capture
from nasbench.errors import MachineError
from nasbench.files import machine_errors, write_text
from nasbench.supernet import checkpoint
from nasbench.supernet.data import Batch
from nasbench.supernet.optimizer import MasterAdamW, cosine
from nasbench.supernet.settings import DistillConfig

Progress = Callable[[str, int, int], None]
"""Called with the stage, the tokens done and the tokens of the whole stage."""

LOSS_COLUMNS = ("stage", "step", "tokens", "layer", "name", "loss")


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C or SIGTERM sets the event, for the loop to stop between two steps; the second Ctrl-C
    interrupts at once. Elsewhere than in the main thread, where Python delivers no signals, nothing changes."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass
class LossSums:
    """Sums of losses per mixer since the last row of losses.csv, kept on the device: reading them would wait for it.

    Attributes:
        names: of the rows, e.g. `layers.3.J`, and "" for the whole network.
        totals: [2, names] fp32, sum and count.
    """

    names: list[str]
    totals: Tensor
    index: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.index = {name: i for i, name in enumerate(self.names)}

    def add(self, name: str, loss: Tensor) -> None:
        """Adds one step's loss, a detached scalar on the device."""
        column = self.index[name]
        self.totals[0, column] += loss
        self.totals[1, column] += 1


class GraphedStep:
    """A training step of fixed work, captured once with its gradients' clipping and replayed for every batch.

    Aligning thirty layers launches thousands of small kernels, which take longer to launch than to run. Only for steps
    that do the same for every batch: block-wise alignment, not random sub-networks.
    """

    def __init__(self, work: Callable[[Batch], None], optimizer: MasterAdamW, sums: LossSums, batch: Batch) -> None:
        self.optimizer = optimizer
        self.batch = batch.clone()
        before = sums.totals.clone()  # the warm-up books its losses too

        def step() -> None:
            work(self.batch)
            optimizer.collect()

        self.graph = capture(step)
        sums.totals.copy_(before)
        self.gradients = {name: p.grad for name, p in optimizer.masters.items() if p.grad is not None}

    def __call__(self, batch: Batch) -> None:
        """Losses booked and the masters' gradients set, of a batch of the shape that was captured."""
        self.batch.copy_(batch)
        self.graph.replay()
        for name, gradient in self.gradients.items():
            self.optimizer.masters[name].grad = gradient


class LossFile:
    """losses.csv: one row per logged step and mixer; layer and name are empty for the whole network."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, stages: Mapping[str, int]) -> None:
        """Keeps the rows up to the given step of each stage: what a killed run logged after its checkpoint goes."""
        rows = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                for row in csv.reader(file):
                    if len(row) == len(LOSS_COLUMNS) and row[1].isdecimal() and int(row[1]) <= stages.get(row[0], 0):
                        rows.append(row)
        write_text(self.path, "".join(",".join(row) + "\n" for row in [list(LOSS_COLUMNS), *rows]))

    def append(self, stage: str, step: int, tokens: int, losses: Mapping[str, float]) -> None:
        """Adds the rows of one logged step."""
        with machine_errors(f"writing {self.path}"), self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for name, loss in losses.items():
                _, layer, kind = name.split(".", 2) if name else ("", "", "")
                writer.writerow((stage, step, tokens, layer, kind, f"{loss:.9g}"))


@dataclass
class Loop:
    """One training stage.

    Attributes:
        folder: of the checkpoints and losses.csv.
        stage: its name.
        optimizer: over the mixers that the stage trains.
        steps, step_tokens: how long it is.
        step: adds gradients and losses of step number n; called with n and the sums.
        state: what every checkpoint says beside the step.
        stop: set to stop between two steps.
        device: of the loss sums.
    """

    folder: Path
    stage: str
    optimizer: MasterAdamW
    steps: int
    step_tokens: int
    step: Callable[[int, LossSums], None]
    config: DistillConfig
    state: Mapping[str, Any]
    stop: threading.Event
    progress: Progress = no_progress
    start: int = 0

    def __post_init__(self) -> None:
        names = ["", *self.optimizer.groups]
        device = next(iter(self.optimizer.working.values())).device
        self.sums = LossSums(names, torch.zeros(2, len(names), device=device))
        self.losses = LossFile(self.folder / "losses.csv")

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continues from a checkpoint of this stage."""
        device = str(self.sums.totals.device)
        tensors = saved.optimizer(device)
        self.sums.totals = tensors.pop("log:totals", self.sums.totals)
        self.optimizer.load_state(tensors)
        self.start = int(saved.state["step"])

    def run(self) -> None:
        """Runs the remaining steps. Raises KeyboardInterrupt when asked to stop, after a checkpoint; MachineError
        naming step and mixer when a loss or weight is not finite, the last good checkpoint being kept."""
        total = self.steps * self.step_tokens
        saved_at = time.monotonic()
        for step in range(self.start, self.steps):
            self.step(step, self.sums)
            self.optimizer.step(cosine(step, self.steps, self.config.warmup))
            done = step + 1
            if done % self.config.log_every == 0 or done == self.steps:
                self._log(done)
            self.progress(self.stage, done * self.step_tokens, total)
            due = time.monotonic() - saved_at > self.config.checkpoint_every_s
            if done < self.steps and (due or self.stop.is_set()):
                self.save(done)
                saved_at = time.monotonic()
            if self.stop.is_set():
                raise KeyboardInterrupt

    def save(self, step: int) -> None:
        """Writes a checkpoint at `step`."""
        for name, master in self.optimizer.masters.items():
            if not bool(torch.isfinite(master).all()):
                raise self._not_finite(name, step)
        tensors = {**self.optimizer.state(), "log:totals": self.sums.totals}
        state = {**self.state, "stage": self.stage, "step": step}
        checkpoint.save(self.folder, f"{self.stage}-{step:08d}", self.optimizer.masters, tensors, state)

    def _log(self, step: int) -> None:
        totals, counts = self.sums.totals.tolist()
        means = {
            name: total / count for name, total, count in zip(self.sums.names, totals, counts, strict=True) if count
        }
        for name, mean in means.items():
            if not mean < float("inf"):
                raise self._not_finite(name or "the network", step)
        self.losses.append(self.stage, step, step * self.step_tokens, means)
        self.sums.totals.zero_()

    def _not_finite(self, name: str, step: int) -> MachineError:
        return MachineError(
            f"{name} is not finite at step {step} of stage {self.stage}: lower {self.stage}_lr; "
            f"the last good checkpoint is kept in {self.folder}"
        )
