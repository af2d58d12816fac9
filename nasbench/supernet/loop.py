"""The resumable loop under every training stage: steps, losses.csv, progress.csv, checkpoints, a clean stop on Ctrl-C.

A checkpoint holds the master weights, the optimiser's moments, the step and the unlogged sums of losses. Batches and
sampled sub-networks are functions of the step. So a run that stops anywhere and continues gives the same numbers.

A stage has one or more cycles of the learning rate, each with its own warm-up, cosine and moments: a finished stage
that gets more tokens goes on with another cycle.
"""

from __future__ import annotations

import csv
import signal
import sys
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
from nasbench.core.files import damaged, machine_errors, write_text
from nasbench.core.sizes import is_count
from nasbench.supernet import checkpoint, tensorboard
from nasbench.supernet.optimizer import cosine
from nasbench.supernet.steps import Stage

Progress = Callable[[str, int, int], None]
"""Called with the stage, the tokens done and the tokens of the whole stage."""
Notice = Callable[[str], None]
"""Called with a line for the person who waits."""

LOSSES, PROGRESS = "losses.csv", "progress.csv"
LOSS_COLUMNS = ("stage", "step", "tokens", "layer", "name", "loss")
PROGRESS_COLUMNS = ("stage", "step", "tokens", "seconds", "tok_s", "lr", "skipped")


def silent(*_: object) -> None:
    """Tells nobody: a `Progress` and a `Notice`."""


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C or SIGTERM sets the event, and the loop stops between two steps. The second interrupts
    at once. Only the main thread gets signals: in others nothing changes."""
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


def _cut(path: Path, columns: Sequence[str], ends: Mapping[str, int]) -> None:
    """Begins a CSV of steps, or keeps of it the whole rows up to the given step of each stage."""
    rows = [list(columns)]
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                whole = len(row) == len(columns) and is_count(row[1])
                if whole and int(row[1]) <= ends.get(row[0], 0):
                    rows.append(row)
    write_text(path, "".join(",".join(row) + "\n" for row in rows))


def last_speed(folder: Path, stage: str) -> float | None:
    """Tokens/s of a stage by the newest row of progress.csv, None without one. Raises UserError for a damaged file."""
    path = folder / PROGRESS
    if not path.is_file():
        return None
    with damaged(path), path.open(encoding="utf-8", newline="") as file:
        found = [float(row["tok_s"]) for row in csv.DictReader(file) if row["stage"] == stage]
    return found[-1] if found else None


def _append(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with machine_errors(f"writing {path}"), path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


@dataclass
class Loop:
    """Runs one training stage.

    Attributes:
        folder: of the checkpoints, losses.csv and progress.csv.
        cycles: after how many steps each cycle of the learning rate ends; the last is the stage's end.
        state: what every checkpoint says beside the step.
        stop: set to stop between two steps.
        start: the step to begin with.
        kept: weights that checkpoints hold beside those that the stage trains.
    """

    folder: Path
    stage: Stage
    cycles: Sequence[int]
    state: Mapping[str, Any]
    stop: threading.Event
    progress: Progress = silent
    notice: Notice = silent
    start: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config, self.workers, self.optimizer = self.stage.config, self.stage.workers, self.stage.optimizer
        self.steps = self.cycles[-1]
        self.skipped: dict[str, int] = {}
        self._add: tensorboard.Add = silent
        self._since = (time.monotonic(), self.start)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in a step."""
        begin = max((end for end in self.cycles if end <= step), default=0)
        end = min(end for end in self.cycles if end > step)
        return cosine(step - begin, end - begin, self.config.warmup)

    def run(self, saved: checkpoint.Checkpoint | None = None, earlier: Sequence[str] = ()) -> None:
        """Runs the steps that remain after a checkpoint of this stage.

        Args:
            earlier: stages before this one, whose rows stay in the CSVs.

        Raises:
            KeyboardInterrupt: asked to stop, after a checkpoint.
            MachineError: nothing finite is left to learn from, naming step and layer. The last good checkpoint stays.
        """
        stage = self.stage
        if saved is not None:
            tensors = checkpoint.optimizer_of(saved, self.optimizer, self.workers)
            stage.sums.totals.copy_(tensors.pop("log:totals"))
            self.optimizer.skipped.copy_(tensors.pop("log:skipped"))
            self.optimizer.load_state(tensors)
            self.start = int(saved.state["step"])
        self.workers.wait(self.optimizer.device)  # nobody writes before all have read
        if self.workers.is_main:
            ends = {**dict.fromkeys(earlier, sys.maxsize), stage.name: self.start}
            _cut(self.folder / LOSSES, LOSS_COLUMNS, ends)
            _cut(self.folder / PROGRESS, PROGRESS_COLUMNS, ends)
        if self.config.tensorboard and self.workers.is_main:
            with tensorboard.opened(self.folder.parent, stage.name, self.start * stage.step_tokens) as self._add:
                self._run()
        else:
            self._run()
        if self.workers.is_main:
            for name, count in self.skipped.items():
                self.notice(f"{name}: {count} of {self.steps - self.start} steps of {stage.name} left out, not finite")

    def _run(self) -> None:
        saved_at = time.monotonic()
        self._since = (saved_at, self.start)
        for step in range(self.start, self.steps):
            if step and step in self.cycles:
                self.optimizer.reset_state()
            self.stage.gradients(step)
            self.optimizer.apply(self.factor(step))
            done = step + 1
            logs = done % self.config.log_every == 0 or done == self.steps
            if logs:
                self._log(done)
            if self.workers.is_main:
                tokens = self.stage.step_tokens
                self.progress(self.stage.name, done * tokens, self.steps * tokens)
            stopping = self.stop.is_set()
            if self.workers.size > 1:
                # All stop at the same step, and asking the others waits for the device.
                stopping = logs and self.workers.any(stopping, self.optimizer.device)
            due = time.monotonic() - saved_at > self.config.checkpoint_every_s
            if self.optimizer.sharded:
                # All write, each its shards.
                due = logs and self.workers.any(due, self.optimizer.device)
            if done < self.steps and (due or stopping):
                self.save(done)
                saved_at = time.monotonic()
            if stopping:
                raise KeyboardInterrupt

    def save(self, step: int) -> None:
        """Writes a checkpoint at `step`."""
        optimizer, stage = self.optimizer, self.stage
        bad = torch.stack([~torch.isfinite(master).all() for master in optimizer.masters.values()]).float()
        if optimizer.sharded:
            self.workers.all_reduce([bad])
        for name, count in zip(optimizer.masters, bad.tolist(), strict=True):
            if count:
                raise self._not_finite(name, step)
        tensors = {**optimizer.state(), "log:totals": stage.sums.totals, "log:skipped": optimizer.skipped}
        state = {**self.state, "stage": stage.name, "step": step}
        weights = {**self.kept, **optimizer.weights()}
        checkpoint.save(self.folder, f"{stage.name}-{step:08d}", weights, tensors, state, self.workers)

    def _log(self, step: int) -> None:
        stage, sums = self.stage, self.stage.sums
        totals, counts, bad = sums.totals.tolist()
        skips = dict(zip(self.optimizer.groups, map(int, self.optimizer.skipped.tolist()), strict=True))
        skips = {name: count for name, count in skips.items() if count}
        sums.totals.zero_()
        self.optimizer.skipped.zero_()
        rows = list(zip(sums.names, totals, counts, bad, strict=True))
        self._check_whole_step(step, skips, {name: int(good + wrong) for name, _, good, wrong in rows}, bad[0] > 0)
        now = time.monotonic()
        seconds, steps = now - self._since[0], step - self._since[1]
        self._since = (now, step)
        if not self.workers.is_main:
            return
        for name, count in skips.items():
            if name not in self.skipped:
                self.notice(f"{name}: a loss or gradient is not finite before step {step} of {stage.name}; left out")
            self.skipped[name] = self.skipped.get(name, 0) + count
        tokens = step * stage.step_tokens
        shown, losses = {}, []
        for name, total, good, _ in rows:
            if good:
                _, layer, kind = name.split(".", 2) if name else ("", "", "")
                losses.append((stage.name, step, tokens, layer, kind, f"{total / good:.9g}"))
                shown[f"{kind}/layer {int(layer):02d}" if layer else "loss"] = total / good
        _append(self.folder / LOSSES, losses)
        speed = steps * stage.step_tokens / max(seconds, 1e-9)
        lr = self.optimizer.lr * self.factor(step - 1)
        text = " ".join(f"{name}:{count}" for name, count in skips.items())
        progress = (stage.name, step, tokens, f"{seconds:.3f}", f"{speed:.1f}", f"{lr:.6g}", text)
        _append(self.folder / PROGRESS, [progress])
        self._add({**shown, "tokens per second": speed, "learning rate": lr}, tokens)

    def _check_whole_step(self, step: int, skips: dict[str, int], counts: dict[str, int], network: bool) -> None:
        """Raises MachineError when a network's loss is not finite, or when every mixer was left out every time."""
        if network:
            for earlier in range(max(0, step - self.config.log_every), step):
                if name := self.stage.first_nonfinite_layer(earlier):
                    raise self._not_finite(name, earlier + 1)
            raise self._not_finite("the network's loss", step)
        if skips and all(skips.get(name, 0) >= count for name, count in counts.items() if name and count):
            raise self._not_finite(next(iter(skips)), step)

    def _not_finite(self, name: str, step: int) -> MachineError:
        setting = "align_lr" if self.stage.name == "align" else "supernet_lr"
        return MachineError(
            f"{name} is not finite at step {step} of stage {self.stage.name}: lower {setting}; "
            f"the last good checkpoint is kept in {self.folder}"
        )
