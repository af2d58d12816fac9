"""NVIDIA Blackwell data-centre GPUs."""

from nasbench.devices.base import DeviceSpec

SPECS = (
    DeviceSpec(
        slug="nvidia-b200",
        title="NVIDIA B200 SXM 180GB",
        pattern=r"\bB200\b",
        arch="sm_100",
        memory_bytes=180 * 10**9,
        bandwidth_gb_s=8000,
        tflop_s=2250,
        shared_memory_bytes=227 << 10,
        source="NVIDIA DGX B200 data sheet, an eighth of the system's 1,440 GB and 64 TB/s",
        sources=(("tflop_s", "NVIDIA Blackwell architecture brief, HGX B200 at 1,000 W, dense bf16"),),
    ),
)
