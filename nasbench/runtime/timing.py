"""Timing work on a CPU or a GPU: warm-up, synchronisation, and repeats until the spread is small."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nasbench.core.errors import MachineError
from nasbench.core.noise import is_noisy
from nasbench.runtime.graph import capture

Call = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long one row may take. It ends when the spread of `least` or more repeats is small, or after `seconds`, never
    before three repeats. `watch` is how long a GPU's power is watched afterwards, in seconds."""

    seconds: float = 0.6
    least: int = 15
    most: int = 200
    watch: float = 0.12


@dataclass(frozen=True)
class Timing:
    """Percentiles in microseconds over `repeats` runs."""

    p20_us: float
    p50_us: float
    p80_us: float
    repeats: int

    def scaled(self, factor: float) -> Timing:
        return Timing(self.p20_us * factor, self.p50_us * factor, self.p80_us * factor, self.repeats)


def summarise(samples_us: list[float]) -> Timing:
    """Percentiles of measured durations."""
    low, middle, high = np.percentile(samples_us, [20, 50, 80])
    return Timing(float(low), float(middle), float(high), len(samples_us))


def repeat(sample_us: Callable[[], float], budget: Budget) -> Timing:
    """Samples durations within the budget, after one sample that is thrown away.

    Args:
        sample_us: does the work once and returns its duration in microseconds.
    """
    began = time.perf_counter()
    sample_us()
    samples: list[float] = []
    while len(samples) < budget.most:
        samples.append(sample_us())
        if len(samples) >= 3 and time.perf_counter() - began > budget.seconds:
            break
        if len(samples) >= budget.least:
            timing = summarise(samples)
            if not is_noisy(timing.p20_us, timing.p50_us, timing.p80_us):
                break
    return summarise(samples)


def time_cpu(calls: Sequence[Call], budget: Budget, evict: Call | None = None) -> Timing:
    """Wall-clock time of all calls together; `evict` runs before each and is not counted."""

    def sample_us() -> float:
        total_ns = 0
        began = time.perf_counter_ns()
        for call in calls:
            if evict is not None:
                total_ns += time.perf_counter_ns() - began
                evict()
                began = time.perf_counter_ns()
            call()
        return (total_ns + time.perf_counter_ns() - began) / 1e3

    return repeat(sample_us, budget)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device) -> Callable[[Call], float]:
    """A function that runs its argument and returns the seconds it took on the device, launches included."""
    if device.type != "cuda":

        def on_host(work: Call) -> float:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        return on_host

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_device(work: Call) -> float:
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return on_device


QUICK_US = 5000.0
"""Work that takes less is timed behind a run of itself: the host launches it while the device is busy, as it does in a
loop of decode steps, and the launch is not counted. Longer work hides it by itself."""
HOST_RUNS, HOST_S = 10, 0.2
"""Times that the launches of a call are timed, unless the calls have taken so many seconds."""
SLOW_S = 0.2
"""Work that takes longer is warm after fewer runs."""
BURST_US = 10_000.0
"""Work is watched in bursts of about this length, one of them always ahead: the device is never idle in between."""


def time_cuda(
    calls: Sequence[Call],
    budget: Budget,
    graph: bool,
    then: Callable[[Call], None] = lambda work: None,
    fall_back: bool = False,
) -> Timing:
    """Device time of all calls together, between two events on the current GPU.

    Args:
        graph: capture them in one CUDA graph and time its replays, as the decode loop runs; without it they are
            launched kernel by kernel, and the launches count where they are the bottleneck.
        then: called after the timing with a burst of what was timed, which it may run again and again.
        fall_back: where the calls cannot be captured, time them without a graph instead of raising MachineError.
    """

    def work() -> None:
        for call in calls:
            call()

    clock = stopwatch(torch.device("cuda"))
    warm_up = 1 if clock(work) > SLOW_S else 2
    launch: Call = work
    try:
        if graph:
            launch = capture(work, warm_up=warm_up).replay
    except MachineError:
        if not fall_back:
            raise
        torch.cuda.synchronize()
    ahead = False

    def sample_us() -> float:
        if ahead:
            launch()
        return clock(launch) * 1e6

    ahead = launch is not work and sample_us() < QUICK_US
    timing = repeat(sample_us, budget)
    then(_bursts(launch, max(1, int(BURST_US / timing.p50_us))))
    torch.cuda.synchronize()
    return timing


def _bursts(launch: Call, runs: int) -> Call:
    """Launches `runs` runs and waits for those of the burst before."""
    before: list[torch.cuda.Event] = []

    def burst() -> None:
        for _ in range(runs):
            launch()
        done = torch.cuda.Event()
        done.record()
        before.append(done)
        if len(before) > 1:
            before.pop(0).synchronize()

    return burst


def launch_us(call: Call) -> float:
    """Microseconds that the host needs to launch the kernels of a call, call behind call as in a prompt: after a wait
    it is slower. Where the call waits for its results, that is part of them."""
    call()
    torch.cuda.synchronize()
    runs, began = 0, time.perf_counter()
    while runs < HOST_RUNS and time.perf_counter() - began < HOST_S:
        call()
        runs += 1
    taken_us = (time.perf_counter() - began) / runs * 1e6
    torch.cuda.synchronize()
    return taken_us
