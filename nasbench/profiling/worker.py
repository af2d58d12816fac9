"""Measuring in a child process, so that the sweep survives whatever a block does to its memory, its device or itself.

A child measures the points of one group. When it dies or hangs, the point in hand becomes a row that says so, and a new
child goes on with the next one. On a CPU the children are forked from a server that has imported torch but used nothing
of it (a tenth of a second each); on a GPU each is started afresh (seconds), because CUDA does not survive a fork, and
the next group's starts while the one before still measures.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from nasbench.core.by_device import ByDevice
from nasbench.core.errors import MachineError, NasbenchError
from nasbench.model import fused
from nasbench.profiling.ceilings import measure_ceilings
from nasbench.profiling.measure import Machine, measure, point_cells, stamp
from nasbench.profiling.plan import Point
from nasbench.profiling.workload import Bench
from nasbench.runtime.timing import Budget
from nasbench.store import Row

START_S = ByDevice(cpu=0.5, cuda=3.0)
"""About what a group waits for its child, for the plan."""
LONGEST_START_S = 300.0
CEILINGS_S = 120.0
"""The device's own limits may take this long whatever the timeout of a row: a slow CPU needs seconds."""
DEATHS = 3
"""After this many deaths in a row the rest of a group is not tried: it would take a time-out each."""
_BROKEN = ("CUDA error", "AcceleratorError")
"""Failures after which a process gets nothing more from its GPU."""
_OOM_FILES = (
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
    Path("/proc/vmstat"),
)


def _oom_kills() -> int:
    """How many processes the system has killed for want of memory, in this container and in all."""
    found = 0
    for path in _OOM_FILES:
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        found += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return found


class Worker:
    """Measures in a child process, which the first point starts.

    Args:
        timeout_s: seconds without an answer after which the child counts as hung.
    """

    def __init__(self, machine: Machine, bench: Bench, timeout_s: float) -> None:
        self.machine = machine
        self.bench = bench
        self.timeout_s = timeout_s
        self._process: Any = None
        self._connection: Connection | None = None
        self._deaths = 0
        self._ahead: tuple[Any, Connection] | None = None

    def ceilings(self) -> list[Row]:
        """The device's own limits. Raises MachineError where the child does not survive that."""
        answer = self._ask("ceilings", None, None, max(self.timeout_s, CEILINGS_S))
        if isinstance(answer, str):
            raise MachineError(f"measuring {self.machine.info.title}'s bandwidth: {answer.partition(' ')[2]}")
        return answer

    def measure(self, point: Point, budget: Budget) -> Row:
        """The row of a point, of whatever status."""
        if self._deaths >= DEATHS:
            return self._problem(point, "failed", f"not tried: {DEATHS} points of this block before it ended so")
        answer = self._ask("point", point, budget, self.timeout_s)
        if isinstance(answer, str):
            self._deaths += 1
            status, _, reason = answer.partition(" ")
            return self._problem(point, status, reason)
        self._deaths = 0
        if answer.status != "ok" and any(text in answer.reason for text in _BROKEN):
            self._end()
        return answer

    def new_group(self) -> None:
        """Frees everything that the group before it held: the next point starts a new child."""
        self._deaths = 0
        self._end()

    def start_ahead(self) -> None:
        """On a GPU, starts the child that the next group will need: importing torch takes it seconds."""
        if self.machine.info.kind == "cuda" and self._ahead is None:
            self._ahead = self._launch()

    def close(self) -> None:
        """Ends all children."""
        self._end()
        if self._ahead is not None:
            self._process, self._connection = self._ahead
            self._ahead = None
            self._kill()

    def _end(self) -> None:
        """Ends the child, at once if it does not go by itself."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()  # an idle child sees it and leaves
        if process is not None:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()

    def _problem(self, point: Point, status: str, reason: str) -> Row:
        cells = point_cells(self.bench, self.machine.info, point)
        return Row(**cells, status=status, reason=reason, **stamp(self.machine))

    def _ask(self, what: str, point: Point | None, budget: Budget | None, timeout_s: float) -> Any:
        """The child's answer; where it died or hung, a status and the reason as one string."""
        if self._process is None:
            self._start()
        process, connection = self._process, self._connection
        assert connection is not None
        kills = _oom_kills()
        answer: Any = None
        try:
            connection.send((what, point, budget))
            if not wait([connection, process.sentinel], timeout_s):
                self._kill()
                return f"failed hung: no answer for {timeout_s:.0f} s"
            answer = connection.recv() if connection.poll() else None
        except (EOFError, OSError):
            answer = None
        if answer is None:
            process.join(2.0)
            code = process.exitcode
            self._kill()
            return _ending(code, _oom_kills() > kills)
        if isinstance(answer, NasbenchError):
            raise answer
        return answer

    def _launch(self) -> tuple[Any, Connection]:
        """A child that is starting."""
        kind = self.machine.info.kind
        context = multiprocessing.get_context("spawn" if kind == "cuda" else "forkserver")
        if kind != "cuda":
            context.set_forkserver_preload([__name__])
        ours, theirs = context.Pipe()
        # A daemon: it ends with this process, however this one ends.
        arguments = (theirs, self.machine, self.bench, torch.get_num_threads())
        process = context.Process(target=_serve, args=arguments, daemon=True)  # type: ignore[attr-defined]
        with _uninterrupted():
            process.start()
        theirs.close()
        return process, ours

    def _start(self) -> None:
        self._process, self._connection = self._ahead or self._launch()
        self._ahead = None
        try:
            ready = self._connection.poll(LONGEST_START_S) and self._connection.recv() == "ready"
        except EOFError:
            ready = False
        if not ready:
            self._process.join(2.0)
            code = self._process.exitcode
            self._kill()
            raise MachineError(f"the measuring process does not start ({_ending(code, False)}): try --in-process")

    def _kill(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
        self._end()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits till the end: a child that is half started would print how it failed to be. Processes begun inside
    inherit that, and so none is interrupted before it can say that Ctrl-C is not for it."""
    resource_tracker.ensure_running()  # begins with the first child, and would lift the mask
    caught: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    # The handler for a signal that another thread of this process takes, the mask for what the children inherit.
    if main:
        signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler)
    if caught:
        signal.raise_signal(signal.SIGINT)


def _ending(code: int | None, out_of_memory: bool) -> str:
    """Status and reason of a child's end."""
    if code is not None and code < 0:
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        if code == -signal.SIGKILL and out_of_memory:
            return "oom killed by the system, which was out of memory"
        return f"failed the measuring process was ended by {name}"
    return f"failed the measuring process ended with exit status {code}"


def _serve(connection: Connection, machine: Machine, bench: Bench, threads: int) -> None:
    """The child: answers until the other side closes."""
    # Ctrl-C reaches the whole group of processes; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        # Where memory runs out, the system is to take this process and not the one that keeps the rows.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    torch.set_num_threads(threads)
    place = torch.device(machine.device)
    if place.type == "cuda" and place.index is not None:
        # Triton launches on the current device, and the allocator tells of that one.
        torch.cuda.set_device(place)
    if machine.info.kind == "cuda" and find_spec("triton"):
        with contextlib.suppress(ImportError):
            fused.ops()
    # What is loaded by now stays: every collection before a row would go through it.
    gc.freeze()
    try:
        connection.send("ready")
    except OSError:  # stopped before this child was needed
        os._exit(0)
    while True:
        try:
            what, point, budget = connection.recv()
        except (EOFError, OSError):
            break
        answer: Any
        try:
            if what == "ceilings":
                answer = measure_ceilings(machine, bench.dtype)
            else:
                machine.budget = budget
                answer = measure(machine, bench, point)
        except NasbenchError as error:
            answer = error
        try:
            connection.send(answer)
        except OSError:
            break
    # Without the interpreter's tidying up, which frees gigabytes piece by piece.
    os._exit(0)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
