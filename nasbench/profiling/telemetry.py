"""What a device tells about itself while it is measured: a GPU its power, clocks, temperature, throttling and energy, a
Jetson board the same by its own sensors, the system how much of the CPU other programs took.

Everything is optional: without NVML, sensors or /proc, or for a figure that a card does not give, the cells stay blank,
and `missing` says in a word why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nasbench.devices.jetson import Jetson

LONGEST_LOAD = 2.5
"""The work runs so many times longer under observation where the energy counter, which is refreshed a few tens of times
per second, has not moved on by then."""
SHARED = 0.05
"""A CPU row counts as throttled when other programs took more than this share of the cores."""
SHARED_REASON = "shared"
_STAT = Path("/proc/stat")
_NODES, _PCI = Path("/sys/devices/system/node"), Path("/sys/bus/pci/devices")
_REASONS = {
    "power cap": "nvmlClocksThrottleReasonSwPowerCap",
    "slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "heat": "nvmlClocksThrottleReasonSwThermalSlowdown",
    "heat (hardware)": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
}
"""NVML's reasons for clocks that are held down, by what `throttle_reasons` calls them."""


@dataclass(frozen=True)
class Reading:
    """One look at the device; None is a figure that it does not give.

    Attributes:
        energy_mj: since the driver was loaded.
        reasons: why the clocks are held down, () for no reason.
        over_current: times that a Jetson board held its clocks down, since it started.
        others_s: CPU seconds that other programs have taken, on the cores that this process may use.
    """

    power_w: float | None = None
    energy_mj: float | None = None
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    temperature_c: float | None = None
    reasons: tuple[str, ...] | None = None
    over_current: int | None = None
    others_s: float | None = None


@dataclass(frozen=True)
class Load:
    """What was seen while the work ran: the last reading, the mean power, every reason for throttling."""

    reading: Reading
    mean_power_w: float | None = None
    reasons: tuple[str, ...] | None = None


class Telemetry:
    """Reads one device. It can be sent to another process, where it opens the device anew.

    Args:
        device: torch device name.
        jetson: where a Jetson board's files are.

    Attributes:
        missing: why a GPU tells nothing, "" where it does.
    """

    def __init__(self, device: str, jetson: Jetson | None = None) -> None:
        self.device = device
        self.missing = ""
        self._nvml: Any = None
        self._handle: Any = None
        self._jetson: Jetson | None = None
        self._cpu = device == "cpu"
        if not device.startswith("cuda"):
            return
        board = jetson or Jetson()
        if board.model:
            self._jetson = board
            return
        try:
            import pynvml
        except ImportError:
            self.missing = "no power, clocks or throttling: the package nvidia-ml-py is absent"
            return
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(device))
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.missing = f"no power, clocks or throttling: NVML says {error}"

    @cached_property
    def numa_node(self) -> int | None:
        """The host memory next to the GPU, or to all cores of this process; None where the system does not tell."""
        if self._cpu:
            return _node_of_cores()
        if self._nvml is None:
            return None
        try:
            address = str(self._nvml.nvmlDeviceGetPciInfo(self._handle).busId).lower()
            node = int((_PCI / address[-12:] / "numa_node").read_text(encoding="ascii"))
        except (self._nvml.NVMLError, OSError, ValueError):
            return None
        return node if node >= 0 else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Telemetry, (self.device, self._jetson)

    def read(self) -> Reading:
        """The device's state now."""
        if self._jetson is not None:
            return _jetson_reading(self._jetson)
        nvml = self._nvml
        if nvml is None:
            return Reading(others_s=_others_s() if self._cpu else None)
        bits = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        held = {name: getattr(nvml, constant) for name, constant in _REASONS.items()}
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage)
        return Reading(
            power_w=None if power_mw is None else power_mw / 1e3,
            energy_mj=self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption),
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            mem_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            reasons=None if bits is None else tuple(name for name, bit in held.items() if int(bits) & bit),
        )

    def load(self, work: Callable[[], object], seconds: float = 0.25) -> Load:
        """Runs the work again and again for a while and watches the device: its mean power from the energy counter,
        between two of its refreshes, or from the sensors."""
        first = self.read()
        if first.power_w is None and first.energy_mj is None:
            return Load(first, reasons=first.reasons)
        began = now = time.perf_counter()
        last, edges, watts = first, [], []
        reasons = dict.fromkeys(first.reasons or ())
        while now - began < LONGEST_LOAD * seconds:
            work()
            reading, now = self.read(), time.perf_counter()
            reasons.update(dict.fromkeys(reading.reasons or ()))
            watts.append(reading.power_w)
            if reading.energy_mj is not None and reading.energy_mj != last.energy_mj:
                edges.append((now, reading.energy_mj))
            last = reading
            refreshed = last.energy_mj is None or (len(edges) > 1 and edges[-1][0] - edges[0][0] > seconds / 2)
            if now - began >= seconds and refreshed:
                break
        if last.over_current is not None and first.over_current is not None and last.over_current > first.over_current:
            reasons["over-current"] = None
        known = [value for value in watts if value is not None]
        power_w = sum(known) / len(known) if known else None
        if len(edges) > 1:
            (start, start_mj), (end, end_mj) = edges[0], edges[-1]
            power_w = (end_mj - start_mj) / 1e3 / (end - start)
        return Load(last, power_w, None if last.reasons is None else tuple(reasons))

    def _ask(self, question: Callable[..., Any], *args: Any) -> float | None:
        try:
            return float(question(self._handle, *args))
        except self._nvml.NVMLError:
            return None


def _jetson_reading(board: Jetson) -> Reading:
    events = board.over_current_events()
    return Reading(
        power_w=board.power_w(),
        sm_clock_mhz=board.sm_clock_mhz(),
        temperature_c=board.temperature_c(),
        reasons=None if events is None else (),
        over_current=events,
    )


def _node_of_cores() -> int | None:
    try:
        cores = os.sched_getaffinity(0)
        nodes = {int(path.parent.name[4:]) for core in cores for path in _NODES.glob(f"node*/cpu{core}")}
    except (AttributeError, OSError, ValueError):
        return None
    return nodes.pop() if len(nodes) == 1 else None


def _others_s() -> float | None:
    """CPU seconds of everything but this process, since the system started; None where /proc does not tell."""
    try:
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        # user nice system idle iowait irq softirq steal
        lines = [line.split() for line in _STAT.read_text(encoding="ascii").splitlines() if line.startswith("cpu")]
        ticks = sum(sum(map(int, [*line[1:4], *line[6:9]])) for line in lines if line[0] in cores)
        own = os.times()
        return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system
    except (OSError, ValueError, AttributeError):
        return None


def shared(before: Reading, after: Reading, seconds: float) -> bool | None:
    """Whether other programs took part of the CPU between two readings; None where nobody can tell."""
    if before.others_s is None or after.others_s is None or seconds <= 0:
        return None
    # The system counts in hundredths of a second: two of them may be rounding.
    others_s = after.others_s - before.others_s - 0.02
    return others_s > SHARED * seconds * len(os.sched_getaffinity(0))


def unequal_clocks(cards: Sequence[Telemetry]) -> str:
    """In which highest clock or power limit cards of one kind differ, "" where they do not."""
    for what, question, *which in (
        ("highest clock", "nvmlDeviceGetMaxClockInfo", 1), ("power limit", "nvmlDeviceGetEnforcedPowerLimit")
    ):  # fmt: skip
        figures = {card.device: card._ask(getattr(card._nvml, question), *which) for card in cards if card._nvml}
        if len(set(figures.values())) > 1:
            return f"{what} of {', '.join(f'{name}: {figure}' for name, figure in figures.items())}"
    return ""


def _uuid(device: str) -> str:
    """NVML's name of a torch device: indices differ where CUDA_VISIBLE_DEVICES hides cards."""
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
