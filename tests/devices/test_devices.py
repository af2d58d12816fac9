"""Data sheets that make sense, names of real drivers, and what is here."""

import pytest

from nasbench.core.errors import MachineError, UserError
from nasbench.devices import DEVICES, DeviceSpec, detect
from nasbench.devices.base import FIGURES, slugify
from nasbench.devices.detect import _gpu_slug


@pytest.mark.parametrize("slug", sorted(DEVICES))
def test_specs_are_plausible(slug):
    spec = DEVICES[slug]
    assert spec.slug == slug == slug.lower()
    assert spec.source
    assert all(spec.figure_sources[figure] for figure in FIGURES)
    assert {name for name, _ in spec.sources} <= set(FIGURES)
    assert spec.arch.startswith("sm_")
    assert 8e9 < spec.memory_bytes < 1e12
    assert 50 < spec.bandwidth_gb_s < 20_000
    assert 1 < spec.tflop_s < 10_000
    assert 48 << 10 <= spec.shared_memory_bytes <= 256 << 10
    # Every card needs hundreds of operations per byte to be bound by arithmetic, none more than a thousand.
    assert 50 < spec.tflop_s * 1e3 / spec.bandwidth_gb_s < 1000


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm"),
        ("NVIDIA GeForce RTX 3090", "nvidia-rtx-3090"),
        ("NVIDIA GeForce RTX 4090", "nvidia-rtx-4090"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA B200", "nvidia-b200"),
        ("Orin", "nvidia-jetson-agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "nvidia-jetson-agx-orin-64gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "nvidia-jetson-orin-nx-16gb"),
    ],
)
def test_drivers_names_are_recognised(name, slug):
    assert [key for key in DEVICES if DEVICES[key].matches(name)] == [slug]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 NVL",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H200 NVL",
        "AMD EPYC",
    ],
)
def test_other_devices_are_not_taken_for_known_ones(name):
    assert not any(DEVICES[key].matches(name) for key in DEVICES)


def test_modules_of_one_name_differ_by_their_memory():
    assert _gpu_slug("NVIDIA Jetson AGX Orin Developer Kit", 65_800_000_000) == "nvidia-jetson-agx-orin-64gb"
    assert _gpu_slug("NVIDIA Jetson AGX Orin", 32_800_000_000) == "nvidia-jetson-agx-orin-32gb"
    assert _gpu_slug("Orin", 8_000_000_000) == "nvidia-orin-8gb"
    assert _gpu_slug("NVIDIA H200", 1 << 30) == "nvidia-h200"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "intel-xeon-platinum-8370c"),
        ("AMD EPYC 9R14 96-Core Processor", "amd-epyc-9r14"),
        ("NVIDIA GeForce RTX 3060", "nvidia-rtx-3060"),
        ("../../etc", "etc"),
        ("", "unknown"),
    ],
)
def test_names_become_file_names(name, slug):
    assert slugify(name) == slug


def test_the_cpu_here():
    info = detect("cpu")
    assert info.kind == "cpu"
    assert info.cores >= 1
    assert info.slug.endswith(f"-{info.cores}c")
    assert info.memory_bytes > 1 << 28
    assert info.llc_bytes >= 0
    assert detect("auto").kind in ("cpu", "cuda")


def test_cpu_without_names_or_caches(monkeypatch, tmp_path):
    import sys

    module = sys.modules["nasbench.devices.detect"]
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(module, "_CACHES", tmp_path / "absent")
    monkeypatch.setattr(module, "_MEMORY_LIMITS", (tmp_path / "limit",))
    (tmp_path / "limit").write_text("1073741824\n")
    info = detect("cpu")
    assert info.slug
    assert (info.llc_bytes, info.memory_bytes) == (0, 1 << 30)
    (tmp_path / "limit").write_text("max\n")
    assert detect("cpu").memory_bytes != 1 << 30


def test_devices_that_are_not_there():
    with pytest.raises(UserError, match="unknown torch device 'tpu': choose from auto, cpu, cuda"):
        detect("tpu")
    with pytest.raises(MachineError, match="cuda:99 is not there"):
        detect("cuda:99")


def test_a_third_party_adds_a_device(monkeypatch):
    from importlib.metadata import EntryPoint

    from nasbench.core import registry

    monkeypatch.setattr(DEVICES, "_discovered", False)
    monkeypatch.setattr(DEVICES, "_items", dict(DEVICES._items))
    point = EntryPoint("acme-one", "tests_acme_device:SPEC", "nasbench.devices")
    spec = DeviceSpec("acme-one", "Acme One", "ACME", "sm_1", 1, 1.0, 1.0, 1, "none")
    import sys
    import types

    module = types.ModuleType("tests_acme_device")
    module.SPEC = spec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests_acme_device", module)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "nasbench.devices" else [])
    assert DEVICES["acme-one"] is spec
