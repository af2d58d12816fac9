"""One point to one row: builds the workload, times it, and says what went wrong where it cannot."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nasbench.core.dtypes import dtype_name
from nasbench.core.noise import is_noisy
from nasbench.core.provenance import provenance
from nasbench.devices import DeviceInfo
from nasbench.profiling.plan import Point
from nasbench.profiling.telemetry import SHARED_REASON, Load, Reading, Telemetry, shared
from nasbench.profiling.workload import Bench, Workload, build
from nasbench.runtime.memory import ran_out
from nasbench.runtime.timing import Budget, Call, Timing, launch_us, time_cpu, time_cuda
from nasbench.store import Row, block_cells


@dataclass
class Machine:
    """The device that rows are measured on.

    Attributes:
        read_gb_s, matmul_tflop_s: its own measured ceilings, None before they are known.
    """

    info: DeviceInfo
    device: str
    telemetry: Telemetry
    budget: Budget
    read_gb_s: float | None = None
    matmul_tflop_s: dict[str, float] = field(default_factory=dict)


def implementation(kind: str, mode: str) -> str:
    """How the engine runs a block on a device of this kind: decode steps of a GPU are replays of a CUDA graph, the
    chunks of a prompt are launched kernel by kernel."""
    return "cuda-graph" if kind == "cuda" and mode == "decode" else "torch-eager"


def point_cells(bench: Bench, info: DeviceInfo, point: Point) -> dict[str, Any]:
    """The key cells of a point's row."""
    cells = block_cells(bench.shape, point.block)
    where = {"mode": point.mode, "batch": point.batch, "context": point.context, "chunk": point.chunk}
    how = {"dtype": dtype_name(bench.dtype), "implementation": implementation(info.kind, point.mode)}
    return {"device": info.slug, **cells, **where, **how}


def stamp(machine: Machine) -> dict[str, Any]:
    """Versions and the time now, as every measured row carries them."""
    info = machine.info
    found = provenance(info.slug, f"{torch.get_num_threads()} threads" if info.kind == "cpu" else info.driver)
    return found.cells("torch", "triton", "driver", "project", "kernels", "measured_utc")


def time_calls(
    machine: Machine, calls: Sequence[Call], launched: bool = False, evict: Call | None = None
) -> tuple[Timing, dict[str, Any]]:
    """(time of one call, its cells with those of the telemetry and the energy of one call) on the machine.

    Args:
        launched: the engine launches these calls kernel by kernel. What the device takes for them is timed in a graph
            nevertheless, where they can be captured; what the host takes is `launch_us`.
    """
    before, began = machine.telemetry.read(), time.perf_counter()
    loads: list[Load] = []

    def watch(work: Call) -> None:
        if machine.budget.watch > 0:
            loads.append(machine.telemetry.load(work, machine.budget.watch))

    if machine.info.kind == "cuda":
        together = time_cuda(calls, machine.budget, True, watch, fall_back=launched)
    else:
        together = time_cpu(calls, machine.budget, evict)
    seconds = time.perf_counter() - began
    timing = together.scaled(1 / len(calls))
    load = loads[0] if loads else Load(machine.telemetry.read())
    cells = _telemetry_cells(before, load, seconds, timing) | {"numa_node": machine.telemetry.numa_node}
    # Other programs lengthen all runs alike: the percentiles alone do not show it.
    cells["noisy"] = is_noisy(timing.p20_us, timing.p50_us, timing.p80_us) or SHARED_REASON in cells["throttle_reasons"]
    return timing, asdict(timing) | cells


def _telemetry_cells(before: Reading, load: Load, seconds: float, timing: Timing) -> dict[str, Any]:
    after = load.reading
    reasons = load.reasons
    if shared(before, after, seconds):
        reasons = (*(reasons or ()), SHARED_REASON)
    elif after.others_s is not None:
        reasons = reasons or ()
    # Mean power under the load times the duration of one call: pauses between calls are not its own.
    energy_j = None if load.mean_power_w is None else load.mean_power_w * timing.p50_us / 1e6
    return {
        "power_w": after.power_w if load.mean_power_w is None else load.mean_power_w,
        "energy_j": energy_j,
        "sm_clock_mhz": after.sm_clock_mhz,
        "mem_clock_mhz": after.mem_clock_mhz,
        "temperature_c": after.temperature_c,
        "throttled": None if reasons is None else bool(reasons),
        "throttle_reasons": "+".join(reasons or ()),
    }


def measure(machine: Machine, bench: Bench, point: Point) -> Row:
    """Measures a point. Whatever happens becomes a row: one that does not fit has status oom, one that cannot run
    unsupported, any other trouble failed, each with its reason. Only KeyboardInterrupt and SystemExit pass."""
    cells = point_cells(bench, machine.info, point)
    problem: dict[str, Any]
    try:
        with torch.inference_mode():
            return Row(**cells, **_measured(machine, bench, point), **stamp(machine))
    except NotImplementedError as error:
        problem = {"status": "unsupported", "reason": _reason(error)}
    except Exception as error:
        # A kind from a third party may raise anything; the sweep must reach the rows behind it.
        problem = {"status": "oom" if ran_out(error) else "failed", "reason": _reason(error)}
    release(machine)
    return Row(**cells, **problem, **stamp(machine))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _measured(machine: Machine, bench: Bench, point: Point) -> dict[str, Any]:
    """The cells that come from running the point."""
    release(machine)
    work = build(bench, point)
    cuda = machine.info.kind == "cuda"
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if not work.calls:
        # What it does is a part of other blocks' kernels, and of their rows.
        return {"p20_us": 0.0, "p50_us": 0.0, "p80_us": 0.0, "repeats": 0, "noisy": False, "reason": work.reason}
    launched = cuda and implementation("cuda", point.mode) == "torch-eager"
    each, timed = time_calls(machine, work.calls, launched, work.evict)
    # Work space, and of the weights and caches those of one instance.
    peak = torch.cuda.max_memory_allocated() - held + held // len(work.calls) if cuda else None
    return {
        **timed,
        "host_us": launch_us(work.calls[0]) if launched else None,
        "peak_bytes": peak,
        "cache_bytes": work.cache_bytes,
        "cache_formula_bytes": work.cache_formula_bytes,
        "conv_state_bytes": work.conv_state_bytes,
        **_rates(machine, work, each, dtype_name(bench.dtype)),
    }


def _rates(machine: Machine, work: Workload, timing: Timing, dtype: str) -> dict[str, float | None]:
    """Achieved rates, and as a share of the device's measured ceilings."""
    gb_s, tflop_s = work.moved_bytes / timing.p50_us / 1e3, work.flops / timing.p50_us / 1e6
    peak = machine.matmul_tflop_s.get(dtype)
    return {
        "gb_s": gb_s,
        "tflop_s": tflop_s,
        "bandwidth_fraction": gb_s / machine.read_gb_s if machine.read_gb_s else None,
        "compute_fraction": tflop_s / peak if peak else None,
    }


def release(machine: Machine) -> None:
    """Frees what an earlier point left on the device, captured graphs included."""
    if machine.info.kind == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
