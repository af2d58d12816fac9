"""NVIDIA Ada Lovelace desktop GPUs."""

from nasbench.devices.base import DeviceSpec

SPECS = (
    DeviceSpec(
        slug="nvidia-rtx-4090",
        title="NVIDIA GeForce RTX 4090",
        pattern=r"RTX 4090(?! D| Laptop)",
        arch="sm_89",
        memory_bytes=24 << 30,
        bandwidth_gb_s=1008,
        tflop_s=165,
        shared_memory_bytes=99 << 10,
        source="NVIDIA Ada GPU architecture white paper, GeForce RTX 4090; fp16 with fp32 accumulation, dense",
    ),
)
