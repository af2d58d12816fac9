"""What a GPU tells about itself while it is measured: power, clocks, temperature, throttling, energy.

Everything is optional: without NVML, or for a figure that a card does not give, the cells stay blank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SHORTEST_ENERGY_S = 0.2
"""The energy counter is refreshed a few tens of times per second: shorter measurements leave it blank."""


@dataclass(frozen=True)
class Reading:
    """One look at the card; None is a figure that it does not give. `energy_mj` counts since the driver was loaded."""

    power_w: float | None = None
    energy_mj: float | None = None
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None


class Telemetry:
    """Reads one device; on a CPU, or without NVML, every reading is empty.

    Args:
        device: torch device name.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        self._handle: Any = None
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
            return Reading()
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


def _uuid(device: str) -> str:
    """NVML's name of a torch device: indices differ where CUDA_VISIBLE_DEVICES hides cards."""
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
