"""Processes that measure placements beside the main one, each on a device of its own.

A member is `python -m nasbench.reproduce.worker` with a Job as one line of JSON on its standard input. The input stays
open: its end tells the member that the main process is gone. What it measures stands in items-N.jsonl, what it says in
measure-N.log of the run folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nasbench.core.files import machine_errors

COMMAND = (sys.executable, "-P", "-m", "nasbench.reproduce.worker")
"""-P: a module in the current folder shadows none of Python's."""
PATIENCE_S = 10.0
"""Of a member that was told to end; then it is killed."""


@dataclass(frozen=True)
class Job:
    """What a member is told.

    Attributes:
        out: the run folder.
        dtype: name of a torch dtype, as in `torch.float32`.
        number, of: the member takes share `number` of `of`; share 0 is the main process's.
        ends: when no further placement is begun, in seconds since 1970.
        recipe: as `Recipe.as_json` writes it.
    """

    out: str
    device: str
    dtype: str
    number: int
    of: int
    ends: float
    recipe: dict[str, Any]


class Team:
    """The members, numbered from 1; leaving the `with` block stops those that still run.

    Args:
        job: of share 0; members get it with their own number and device.
        devices: torch devices of the members.
    """

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self.job, self.devices = job, devices
        self._members: dict[int, subprocess.Popen[str]] = {}
        self._told: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members.values():
            member.terminate()
        for member in self._members.values():
            try:
                member.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                member.kill()
                member.wait()
            if member.stdin:
                member.stdin.close()

    def start(self, number: int) -> None:
        """Starts a member. Raises MachineError where the system lets it start no process or write no log."""
        job = replace(self.job, number=number, device=self.devices[number - 1])
        # It finds what this process finds, also in a bare checkout.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with machine_errors(f"starting a process for {job.device}"), self.log(number).open("w") as log:
            member = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
                # Ctrl-C is for this process, which stops the others.
                start_new_session=True,
            )
        self._members[number] = member
        assert member.stdin is not None
        try:
            member.stdin.write(json.dumps(asdict(job)) + "\n")
            member.stdin.flush()
        except BrokenPipeError:
            # Dead already; `fallen` says of what.
            member.stdin = None

    def log(self, number: int) -> Path:
        """What a member writes beside its values."""
        return Path(self.job.out) / f"measure-{number}.log"

    def running(self) -> bool:
        """Whether a member has not ended yet."""
        return any(member.poll() is None for member in self._members.values())

    def fallen(self) -> list[tuple[int, str]]:
        """(number, a line that says of what) of the members that failed since the last call."""
        found = []
        for number, member in self._members.items():
            if member.poll() and number not in self._told:
                self._told.add(number)
                found.append((number, self._last_words(number, int(member.returncode))))
        return found

    def _last_words(self, number: int, code: int) -> str:
        """The last line of a log, and how its process ended."""
        how = f"exit code {code}"
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        lines = self.log(number).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{last} ({how})" if last else how
