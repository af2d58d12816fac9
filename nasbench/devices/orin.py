"""NVIDIA Jetson Orin modules: the memory is shared with the CPU."""

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
        source="NVIDIA Jetson AGX Orin series technical brief; fp16 dense is derived from its 275 sparse INT8 TOPS",
    ),
)
