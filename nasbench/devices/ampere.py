"""NVIDIA Ampere GPUs, data centre and desktop."""

from nasbench.devices.base import DeviceSpec

SPECS = (
    DeviceSpec(
        slug="nvidia-a100-sxm",
        title="NVIDIA A100 SXM 80GB",
        pattern=r"A100[- ]SXM4?[- ]80GB",
        arch="sm_80",
        memory_bytes=80 * 10**9,
        bandwidth_gb_s=2039,
        tflop_s=312,
        shared_memory_bytes=163 << 10,
        source="NVIDIA A100 80GB data sheet, column SXM, dense",
    ),
    DeviceSpec(
        slug="nvidia-rtx-3090",
        title="NVIDIA GeForce RTX 3090",
        pattern=r"RTX 3090(?! Ti)",
        arch="sm_86",
        memory_bytes=24 << 30,
        bandwidth_gb_s=936,
        tflop_s=71,
        shared_memory_bytes=99 << 10,
        source="NVIDIA GA102 GPU architecture white paper, GeForce RTX 3090; fp16 with fp32 accumulation, dense",
    ),
)
