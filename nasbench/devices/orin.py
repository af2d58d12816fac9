"""NVIDIA Jetson Orin modules: the memory is shared with the CPU. Their GPUs all call themselves "Orin": the board's own
name (nasbench.devices.jetson) and the size of the memory tell them apart."""

from nasbench.devices.base import DeviceSpec

SPECS = (
    DeviceSpec(
        slug="nvidia-jetson-agx-orin-64gb",
        title="NVIDIA Jetson AGX Orin 64GB",
        pattern=r"AGX Orin|^Orin$",
        arch="sm_87",
        memory_bytes=64 << 30,
        bandwidth_gb_s=204.8,
        tflop_s=43,
        shared_memory_bytes=163 << 10,
        source="NVIDIA Jetson AGX Orin series data sheet, 64GB module",
        sources=(("tflop_s", "derived: a quarter of the GPU's 170 sparse INT8 TOPS (AGX Orin technical brief)"),),
        unified_memory=True,
    ),
    DeviceSpec(
        slug="nvidia-jetson-orin-nx-16gb",
        title="NVIDIA Jetson Orin NX 16GB",
        pattern=r"Orin NX",
        arch="sm_87",
        memory_bytes=16 << 30,
        bandwidth_gb_s=102.4,
        tflop_s=15,
        shared_memory_bytes=163 << 10,
        source="NVIDIA Jetson Orin NX series data sheet, 16GB module",
        sources=(
            ("tflop_s", "derived: AGX Orin's 170 sparse INT8 TOPS x 1024/2048 cores x 918/1300 MHz, a quarter of that"),
        ),
        unified_memory=True,
    ),
)
