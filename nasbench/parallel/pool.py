"""Child processes that run `nasbench` commands beside this one, each with a log file of its own.

A child ends when this process is gone: it holds the child's standard input, and `leave_with_parent` watches it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from nasbench.core.files import machine_errors

COMMAND = (sys.executable, "-P", "-m", "nasbench")
"""-P: a module in the current folder shadows none of Python's."""
WITH_PARENT = "NASBENCH_WITH_PARENT"
PATIENCE_S = 10.0
"""Time that a child gets to end before it is killed."""


@dataclass(frozen=True)
class Job:
    """One child.

    Attributes:
        title: names it in messages, as a device.
        words: the command line behind `nasbench`.
        log: file for its output.
    """

    title: str
    words: tuple[str, ...]
    log: Path


class Pool:
    """Runs the jobs; leaving the `with` block stops those that still run."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._told: set[int] = set()

    def __enter__(self) -> Self:
        for number, job in enumerate(self.jobs):
            self._children[number] = _start(job)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            try:
                child.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdin:
                child.stdin.close()

    def running(self) -> bool:
        """Whether a child has not ended yet."""
        return any(child.poll() is None for child in self._children.values())

    def failed(self) -> list[tuple[int, str]]:
        """(number, its last log line) of the children that failed since the last call."""
        found = []
        for number, child in self._children.items():
            if child.poll() and number not in self._told:
                self._told.add(number)
                found.append((number, _reason(self.jobs[number].log, int(child.returncode))))
        return found


def _start(job: Job) -> subprocess.Popen[bytes]:
    """Raises MachineError where the system starts no process or writes no log."""
    # The child finds what this process finds, also in a bare checkout.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with machine_errors(f"starting a process for {job.title}"):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w") as log:
            return subprocess.Popen(
                [*COMMAND, *job.words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, WITH_PARENT: "1"},
                # Ctrl-C is for this process, which stops the others.
                start_new_session=True,
            )


def _reason(log: Path, code: int) -> str:
    """The last line of a log, and how its process ended."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{last} ({how})" if last else how


def leave_with_parent() -> None:
    """In a child of a pool: ends the process when its parent is gone. Does nothing in any other process."""
    if os.environ.pop(WITH_PARENT, ""):
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    sys.stdin.read()
    sys.stdout.flush()
    os._exit(1)
