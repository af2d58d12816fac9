"""The resumable loop under every training stage: steps, losses.csv, progress.csv, checkpoints, a clean stop on Ctrl-C.

A checkpoint holds the master weights, the optimiser's moments, the step and the unlogged sums of losses; batches and
sampled sub-networks are functions of the step. So a run that is stopped anywhere and started again goes through the
same numbers as one that is not.

A stage's steps are one or more cycles of the learning rate, each with its own warm-up, cosine and moments: a finished
stage that gets more tokens goes on with another cycle.
"""

from __future__ import annotations

import csv
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nasbench.core.errors import MachineError
from nasbench.core.files import machine_errors, write_text
from nasbench.data.packing import Batch
from nasbench.parallel.context import SINGLE, DistContext
from nasbench.runtime.graph import capture
from nasbench.supernet import checkpoint, sharded_checkpoint, tensorboard
from nasbench.supernet.optimizer import MasterAdamW, cosine
from nasbench.supernet.settings import DistillConfig

Progress = Callable[[str, int, int], None]
"""Called with the stage, the tokens done and the tokens of the whole stage."""
Notice = Callable[[str], None]
"""Called with a line for the person who waits."""

LOSS_COLUMNS = ("stage", "step", "tokens", "layer", "name", "loss")
PROGRESS_COLUMNS = ("stage", "step", "tokens", "seconds", "tok_s", "lr", "skipped")


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


def no_notice(message: str) -> None:
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


class LossSums:
    """Sums of losses per mixer since the last row of losses.csv, kept on the device: reading them would wait for it.

    Attributes:
        names: of the rows, e.g. `layers.3.J`, and "" for the whole network.
        totals: [3, names] fp32: sum of the finite losses, how many, and how many were not finite.
        now: [2, names] fp32, of the step in progress: weight x loss, weight.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.totals = torch.zeros(3, len(self.names), device=device)
        self.now = torch.zeros(2, len(self.names), device=device)

    def add(self, name: str, loss: Tensor, weight: Tensor | float = 1.0) -> None:
        """This step's loss of a row, a detached scalar on the device, and its weight beside other processes'."""
        column = self.now[:, self.index[name]]
        column[0] = loss * weight
        column[1] = weight

    def add_all(self, names: Iterable[str], loss: Tensor) -> None:
        """One loss for several rows."""
        rows = torch.zeros(len(self.names))
        rows[[self.index[name] for name in names]] = 1.0
        rows = rows.to(self.now.device, non_blocking=True)
        self.now[1] += rows
        self.now[0] += torch.where(rows > 0, loss, 0.0)

    def accumulate(self) -> Tensor:
        """Ends the step: its losses go to the totals. Which rows had no loss that is not finite, [names] bool."""
        value, there = self.now[0] / self.now[1], self.now[1] != 0
        good = there & value.isfinite()
        bad = there & ~good
        self.totals += torch.stack((torch.where(good, value, 0.0), good.float(), bad.float()))
        self.now.zero_()
        return ~bad


def reduce_and_clip(optimizer: MasterAdamW, sums: LossSums, workers: DistContext) -> None:
    """Between the backward pass and the optimiser's step: gradients gathered, over processes too, losses booked,
    gradients clipped and those that are not finite left out."""
    optimizer.gather()
    if workers.size > 1:
        own = sums.now[1].clone()
        workers.all_reduce([sums.now])
        optimizer.average(workers, (own / sums.now[1])[1:])
    optimizer.clip(sums.accumulate()[1:], workers)


class GraphedStep:
    """A training step of fixed work, captured once with its gradients' clipping and replayed for every batch.

    Aligning thirty layers launches thousands of small kernels, which take longer to launch than to run. Only for steps
    that do the same for every batch: block-wise alignment, not random sub-networks. What several processes sum is
    summed outside of the graph.
    """

    def __init__(
        self,
        work: Callable[[Batch], None],
        optimizer: MasterAdamW,
        sums: LossSums,
        batch: Batch,
        workers: DistContext = SINGLE,
    ) -> None:
        self.optimizer, self.sums, self.workers = optimizer, sums, workers
        self.batch = batch.clone()
        # The warm-up books its losses too.
        kept = [(tensor, tensor.clone()) for tensor in (sums.totals, sums.now, optimizer.skipped)]

        def step() -> None:
            for parameter in optimizer.working.values():
                parameter.grad = None
            work(self.batch)
            if workers.size == 1:
                reduce_and_clip(optimizer, sums, workers)

        self.graph = capture(step)
        for tensor, before in kept:
            tensor.copy_(before)
        self.owners = optimizer.masters if workers.size == 1 else optimizer.working
        self.gradients = {name: p.grad for name, p in self.owners.items() if p.grad is not None}

    def __call__(self, batch: Batch) -> None:
        """Losses booked and the masters' gradients set, of a batch of the shape that was captured."""
        self.batch.copy_(batch)
        self.graph.replay()
        for name, gradient in self.gradients.items():
            self.owners[name].grad = gradient
        if self.workers.size > 1:
            reduce_and_clip(self.optimizer, self.sums, self.workers)


class RowFile:
    """A CSV that a stage appends to; a killed run's rows behind its last checkpoint are cut away."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns

    def cut(self, stages: Mapping[str, int]) -> None:
        """Keeps the rows up to the given step of each stage."""
        rows = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                for row in csv.reader(file):
                    whole = len(row) == len(self.columns) and row[1].isdecimal()
                    if whole and int(row[1]) <= stages.get(row[0], 0):
                        rows.append(row)
        write_text(self.path, "".join(",".join(row) + "\n" for row in [list(self.columns), *rows]))

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        with machine_errors(f"writing {self.path}"), self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


@dataclass
class Loop:
    """One training stage.

    Attributes:
        folder: of the checkpoints, losses.csv and progress.csv.
        stage: its name.
        optimizer: over the mixers that the stage trains.
        cycles: after how many steps each cycle of the learning rate ends; the last is the stage's end.
        step_tokens: of a step, over all processes.
        step: gathers gradients and losses of step number n.
        state: what every checkpoint says beside the step.
        stop: set to stop between two steps.
        first_nonfinite_layer: names the layer that made the loss of step number n not finite, None where none is found.
        start: the step to begin with.
        kept: weights that checkpoints hold beside those that the stage trains.
    """

    folder: Path
    stage: str
    optimizer: MasterAdamW
    cycles: Sequence[int]
    step_tokens: int
    step: Callable[[int, LossSums], None]
    config: DistillConfig
    state: Mapping[str, Any]
    stop: threading.Event
    progress: Progress = no_progress
    notice: Notice = no_notice
    workers: DistContext = SINGLE
    first_nonfinite_layer: Callable[[int], str | None] = lambda step: None
    start: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.steps = self.cycles[-1]
        self.sums = LossSums(["", *self.optimizer.groups], self.optimizer.device)
        self.losses = RowFile(self.folder / "losses.csv", LOSS_COLUMNS)
        self.progressed = RowFile(self.folder / "progress.csv", PROGRESS_COLUMNS)
        self.skipped: dict[str, int] = {}
        self.board = tensorboard.Board()
        self._since = (time.monotonic(), self.start)

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continues from a checkpoint of this stage."""
        tensors = sharded_checkpoint.optimizer_of(saved, self.optimizer, self.workers)
        self.sums.totals.copy_(tensors.pop("log:totals"))
        self.optimizer.skipped.copy_(tensors.pop("log:skipped"))
        self.optimizer.load_state(tensors)
        self.start = int(saved.state["step"])

    def cut(self, stages: Mapping[str, int]) -> None:
        """Keeps the CSVs' rows up to the given step of each stage, this one's up to its start."""
        if self.workers.is_main:
            for file in (self.losses, self.progressed):
                file.cut({**stages, self.stage: self.start})

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in a step."""
        begin = max((end for end in self.cycles if end <= step), default=0)
        end = min(end for end in self.cycles if end > step)
        return cosine(step - begin, end - begin, self.config.warmup)

    def run(self) -> None:
        """Runs the remaining steps. Raises KeyboardInterrupt when asked to stop, after a checkpoint; MachineError
        naming step and layer when nothing finite is left to learn from, the last good checkpoint being kept."""
        shown = self.config.tensorboard and self.workers.is_main
        with tensorboard.opened(self.folder.parent, self.stage, shown, self.start * self.step_tokens) as self.board:
            self._run()

    def _run(self) -> None:
        saved_at = time.monotonic()
        self._since = (saved_at, self.start)
        for step in range(self.start, self.steps):
            if step and step in self.cycles:
                self.optimizer.forget()
            self.step(step, self.sums)
            self.optimizer.apply(self.factor(step))
            done = step + 1
            logs = done % self.config.log_every == 0 or done == self.steps
            if logs:
                self._log(done)
            if self.workers.is_main:
                self.progress(self.stage, done * self.step_tokens, self.steps * self.step_tokens)
            stopping = self.stop.is_set()
            if self.workers.size > 1:
                # All stop at the same step, and asking the others waits for the device.
                stopping = logs and self.workers.any(stopping, self.optimizer.device)
            due = time.monotonic() - saved_at > self.config.checkpoint_every_s
            if self.optimizer.sharded:
                # All write, each its shares.
                due = logs and self.workers.any(due, self.optimizer.device)
            if done < self.steps and (due or stopping) and (self.workers.is_main or self.optimizer.sharded):
                self.save(done)
                saved_at = time.monotonic()
            if stopping:
                raise KeyboardInterrupt

    def save(self, step: int) -> None:
        """Writes a checkpoint at `step`. With shards, all processes call it."""
        optimizer = self.optimizer
        bad = torch.stack([~torch.isfinite(master).all() for master in optimizer.masters.values()]).float()
        if optimizer.sharded:
            self.workers.all_reduce([bad])
        for name, count in zip(optimizer.masters, bad.tolist(), strict=True):
            if count:
                raise self._not_finite(name, step)
        logged = {"log:totals": self.sums.totals, "log:skipped": optimizer.skipped}
        state = {**self.state, "stage": self.stage, "step": step}
        name = f"{self.stage}-{step:08d}"
        weights = {**self.kept, **optimizer.weights()}
        sharded_checkpoint.save(self.folder, name, weights, {**optimizer.state(), **logged}, state, self.workers)

    def _log(self, step: int) -> None:
        totals, counts, bad = self.sums.totals.tolist()
        skips = dict(zip(self.optimizer.groups, map(int, self.optimizer.skipped.tolist()), strict=True))
        skips = {name: count for name, count in skips.items() if count}
        self.sums.totals.zero_()
        self.optimizer.skipped.zero_()
        rows = list(zip(self.sums.names, totals, counts, bad, strict=True))
        self._check_whole_step(step, skips, {name: int(good + wrong) for name, _, good, wrong in rows}, bad[0] > 0)
        now = time.monotonic()
        seconds, steps = now - self._since[0], step - self._since[1]
        self._since = (now, step)
        for name, count in skips.items():
            if name not in self.skipped:
                self.notice(f"{name}: a loss or gradient is not finite before step {step} of {self.stage}; left out")
            self.skipped[name] = self.skipped.get(name, 0) + count
        if not self.workers.is_main:
            return
        tokens = step * self.step_tokens
        losses = []
        for name, total, good, _ in rows:
            if good:
                _, layer, kind = name.split(".", 2) if name else ("", "", "")
                losses.append((self.stage, step, tokens, layer, kind, f"{total / good:.9g}"))
        self.losses.append(losses)
        speed = steps * self.step_tokens / max(seconds, 1e-9)
        lr = self.optimizer.lr * self.factor(step - 1)
        text = " ".join(f"{name}:{count}" for name, count in skips.items())
        self.progressed.append([(self.stage, step, tokens, f"{seconds:.3f}", f"{speed:.1f}", f"{lr:.6g}", text)])
        shown = {tensorboard.loss_name(layer, kind): float(loss) for _, _, _, layer, kind, loss in losses}
        self.board.add({**shown, "tokens per second": speed, "learning rate": lr}, tokens)

    def _check_whole_step(self, step: int, skips: dict[str, int], counts: dict[str, int], network: bool) -> None:
        """Raises MachineError when a network's loss is not finite, or when every mixer was left out every time."""
        if network:
            for earlier in range(max(0, step - self.config.log_every), step):
                if name := self.first_nonfinite_layer(earlier):
                    raise self._not_finite(name, earlier + 1)
            raise self._not_finite("the network's loss", step)
        if skips and all(skips.get(name, 0) >= count for name, count in counts.items() if name and count):
            raise self._not_finite(next(iter(skips)), step)

    def _not_finite(self, name: str, step: int) -> MachineError:
        setting = "align_lr" if self.stage == "align" else "supernet_lr"
        return MachineError(
            f"{name} is not finite at step {step} of stage {self.stage}: lower {setting}; "
            f"the last good checkpoint is kept in {self.folder}"
        )
