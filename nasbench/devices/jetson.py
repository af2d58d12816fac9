"""Jetson Orin boards: what files of the system say where NVML is silent: power, temperature, clocks, memory.

Power: INA3221 chips of three channels each, under /sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*: `in<N>_label` names the
rail, `in<N>_input` is its millivolts, `curr<N>_input` its milliamperes (Jetson Linux Developer Guide, "Jetson Orin Nano
Series, Jetson Orin NX Series and Jetson AGX Orin Series", software-based power consumption modelling). An Orin NX has
the rail VDD_IN, the whole module. An AGX Orin has none: its GPU and SoC, CPU and 5 V rails are added up, and
VDDQ_VDD2_1V8AO, which its sensor shows at 5 V, is taken to be part of the 5 V rail.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WHOLE = "VDD_IN"
WITHIN = ("VDDQ_VDD2_1V8AO",)
"""Rails that another rail of the sum feeds."""
_SENSORS = ("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*", "sys/class/hwmon/hwmon*")
_CHANNELS = (1, 2, 3)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_read(path))
    except ValueError:
        return None


@dataclass(frozen=True)
class Jetson:
    """The board's files below `root`. Every figure is None where its file is absent."""

    root: Path = Path("/")

    @property
    def model(self) -> str:
        """The board's name, e.g. "NVIDIA Jetson AGX Orin Developer Kit"; "" on other machines."""
        name = _read(self.root / "proc/device-tree/model")
        return name if "Jetson" in name or "Orin" in name else ""

    def rails_w(self) -> dict[str, float]:
        """Watts by rail; unconnected channels are left out."""
        rails: dict[str, float] = {}
        for pattern in _SENSORS:
            for folder in sorted(self.root.glob(pattern)):
                for channel in _CHANNELS:
                    label = _read(folder / f"in{channel}_label")
                    volts, amperes = (_number(folder / f"{what}{channel}_input") for what in ("in", "curr"))
                    if label and label != "NC" and volts is not None and amperes is not None:
                        rails[label] = volts * amperes / 1e6
            if rails:
                break
        return rails

    def power_w(self) -> float | None:
        """Watts of the module."""
        rails = self.rails_w()
        if WHOLE in rails:
            return rails[WHOLE]
        return sum(watts for rail, watts in rails.items() if rail not in WITHIN) if rails else None

    def temperature_c(self) -> float | None:
        """Of the GPU."""
        for zone in sorted(self.root.glob("sys/class/thermal/thermal_zone*")):
            if _read(zone / "type").lower() in ("gpu-thermal", "gpu_therm"):
                millidegrees = _number(zone / "temp")
                return None if millidegrees is None else millidegrees / 1e3
        return None

    def sm_clock_mhz(self) -> float | None:
        """The GPU's clock."""
        for folder in sorted(self.root.glob("sys/class/devfreq/*")):
            if folder.name.endswith((".gpu", ".ga10b", ".gv11b")):
                hertz = _number(folder / "cur_freq")
                return None if hertz is None else hertz / 1e6
        return None

    def over_current_events(self) -> int | None:
        """How often the board has held its clocks down for too much current, since it started."""
        counts = [_number(path) for path in self.root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt")]
        known = [int(count) for count in counts if count is not None]
        return sum(known) if known else None

    def available_bytes(self) -> int | None:
        """Memory that CPU and GPU together could still take."""
        for line in _read(self.root / "proc/meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None
