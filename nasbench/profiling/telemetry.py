"""What a device tells about itself while it is measured: a GPU its power, clocks, temperature, throttling and energy,
the system how much of the CPU other programs took.

Everything is optional: without NVML or /proc, or for a figure that a card does not give, the cells stay blank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORTEST_ENERGY_S = 0.2
"""The energy counter is refreshed a few tens of times per second: shorter measurements leave it blank."""
SHARED = 0.05
"""A CPU row counts as throttled when other programs took more than this share of the cores."""
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Reading:
    """One look at the card; None is a figure that it does not give. `energy_mj` counts since the driver was loaded."""

    power_w: float | None = None
    energy_mj: float | None = None
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    others_s: float | None = None
    """CPU seconds that other programs have taken, on the cores that this process may use."""


class Telemetry:
    """Reads one device; without NVML, every reading of a GPU is empty.

    Args:
        device: torch device name.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._cpu = device == "cpu"
        if not device.startswith("cuda"):
            return
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(device))
            self._nvml = pynvml
        except pynvml.NVMLError:
            return

    def read(self) -> Reading:
        """The card's state now."""
        nvml = self._nvml
        if nvml is None:
            return Reading(others_s=_others_s() if self._cpu else None)
        slow = (
            nvml.nvmlClocksThrottleReasonSwPowerCap
            | nvml.nvmlClocksThrottleReasonHwSlowdown
            | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage)
        return Reading(
            power_w=None if power_mw is None else power_mw / 1e3,
            energy_mj=self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption),
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            mem_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            throttled=None if reasons is None else bool(int(reasons) & slow),
        )

    def _ask(self, question: Callable[..., Any], *args: Any) -> float | None:
        try:
            return float(question(self._handle, *args))
        except self._nvml.NVMLError:
            return None


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


def _uuid(device: str) -> str:
    """NVML's name of a torch device: indices differ where CUDA_VISIBLE_DEVICES hides cards."""
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
