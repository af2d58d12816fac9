"""Jetson boards, by trees of files as their systems show them (figures typical of an AGX Orin and an Orin NX)."""

import shutil
from pathlib import Path

import pytest

from nasbench.devices.jetson import Jetson

AGX = Jetson(Path(__file__).parent / "jetson_agx_orin")
NX = Jetson(Path(__file__).parent / "jetson_orin_nx")


def test_an_agx_orin_adds_its_rails_up():
    assert AGX.model == "NVIDIA Jetson AGX Orin Developer Kit"
    rails = AGX.rails_w()
    assert set(rails) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}
    assert rails["VDD_GPU_SOC"] == pytest.approx(24.28, abs=0.01)
    assert AGX.power_w() == pytest.approx(24.28 + 6.14 + 5.64, abs=0.02)
    assert AGX.temperature_c() == pytest.approx(47.406)
    assert AGX.sm_clock_mhz() == pytest.approx(1300.5)
    assert AGX.over_current_events() == 2
    assert AGX.available_bytes() == 57230184 * 1024


def test_an_orin_nx_measures_the_whole_module():
    assert NX.power_w() == pytest.approx(10.55, abs=0.01)
    assert NX.sm_clock_mhz() == 918.0
    assert (NX.temperature_c(), NX.over_current_events()) == (None, None)


def test_other_machines_and_unreadable_sensors_say_nothing(tmp_path):
    absent = Jetson(tmp_path)
    assert absent.model == ""
    assert absent.power_w() is absent.temperature_c() is absent.sm_clock_mhz() is absent.available_bytes() is None
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5\0")
    assert absent.model == ""
    broken = tmp_path / "broken"
    shutil.copytree(AGX.root, broken)
    for path in broken.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/*/curr*_input"):
        path.write_text("")
    assert Jetson(broken).power_w() is None
