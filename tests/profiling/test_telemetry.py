"""What is read of a device under load: an NVML that is played, a Jetson's recorded files, and neither."""

import pickle
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nasbench.devices.jetson import Jetson
from nasbench.profiling import telemetry as module
from nasbench.profiling.measure import _telemetry_cells
from nasbench.profiling.telemetry import Load, Reading, Telemetry
from nasbench.runtime.timing import Timing

AGX = Path(__file__).parents[1] / "devices" / "jetson_agx_orin"


class NvmlError(Exception):
    pass


def played_nvml(watts: float, bits: int = 0) -> SimpleNamespace:
    """A card that draws so much; its energy counter moves every 50 ms, and it knows no memory clock."""
    began = time.perf_counter()

    def clock(handle, which):
        if which == "memory":
            raise NvmlError
        return 1980

    names = ["SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown"]
    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: "card",
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: bits,
        nvmlDeviceGetPowerUsage=lambda handle: 90_000,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: int((time.perf_counter() - began) / 0.05) * 50 * watts,
        nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetTemperature=lambda handle, which: 41,
        **{f"nvmlClocksThrottleReason{name}": 1 << place for place, name in enumerate(names, 2)},
    )


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(module, "_uuid", lambda device: "GPU-0")

    def make(*args) -> Telemetry:
        monkeypatch.setitem(sys.modules, "pynvml", played_nvml(*args))
        return Telemetry("cuda")

    return make


def test_power_is_that_of_the_energy_counter_under_load(card):
    runs = []
    load = card(500.0).load(lambda: (runs.append(1), time.sleep(0.01)))
    assert load.mean_power_w == pytest.approx(500, rel=0.1)
    assert (load.reasons, load.reading.sm_clock_mhz, load.reading.mem_clock_mhz) == ((), 1980.0, None)
    assert 10 < len(runs) < 80
    cells = _telemetry_cells(Reading(), load, 0.3, Timing(900.0, 1000.0, 1100.0, 9))
    assert cells["energy_j"] == pytest.approx(0.5, rel=0.1)
    assert (cells["throttled"], cells["throttle_reasons"]) == (False, "")


def test_reasons_for_throttling_are_named(card):
    load = card(700.0, 4 | 32).load(lambda: time.sleep(0.01))
    cells = _telemetry_cells(Reading(), load, 0.3, Timing(1.0, 1.0, 1.0, 9))
    assert (cells["throttled"], cells["throttle_reasons"]) == (True, "power cap+heat (hardware)")


def test_a_jetson_is_read_by_its_own_sensors(tmp_path):
    shutil.copytree(AGX, tmp_path / "root")
    count = tmp_path / "root/sys/class/hwmon/hwmon2/oc3_event_cnt"
    board = Telemetry("cuda", Jetson(tmp_path / "root"))
    assert board.read().power_w == pytest.approx(36.07, abs=0.05)
    load = board.load(lambda: time.sleep(0.01))
    assert (load.mean_power_w, load.reasons) == (pytest.approx(36.07, abs=0.05), ())
    held = board.load(lambda: count.write_text("3\n"))
    assert held.reasons == ("over-current",)
    # A child process opens the same board.
    assert pickle.loads(pickle.dumps(board)).read().temperature_c == pytest.approx(47.406)


def test_without_nvml_the_work_does_not_run_again_and_a_word_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    telemetry = Telemetry("cuda")
    assert "nvidia-ml-py is absent" in telemetry.missing
    assert telemetry.load(lambda: pytest.fail("ran")) == Load(Reading())
    broken = played_nvml(1.0)
    broken.nvmlInit = lambda: (_ for _ in ()).throw(NvmlError("Driver Not Loaded"))
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert Telemetry("cuda").missing.endswith("NVML says Driver Not Loaded")
    assert Telemetry("cpu").missing == ""


def test_a_shared_cpu_is_a_reason():
    busy = Load(Reading(others_s=100.0))
    cells = _telemetry_cells(Reading(others_s=0.0), busy, 1.0, Timing(1.0, 1.0, 1.0, 9))
    assert (cells["throttled"], cells["throttle_reasons"]) == (True, "shared")
    quiet = _telemetry_cells(Reading(others_s=0.0), Load(Reading(others_s=0.0)), 1.0, Timing(1.0, 1.0, 1.0, 9))
    assert (quiet["throttled"], quiet["throttle_reasons"]) == (False, "")
