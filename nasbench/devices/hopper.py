"""NVIDIA Hopper data-centre GPUs."""

from nasbench.devices.base import DeviceSpec

SPECS = (
    DeviceSpec(
        slug="nvidia-h100-sxm",
        title="NVIDIA H100 SXM 80GB",
        pattern=r"H100 (80GB HBM3|SXM)",
        arch="sm_90",
        memory_bytes=80 * 10**9,
        bandwidth_gb_s=3350,
        tflop_s=989,
        shared_memory_bytes=227 << 10,
        source="NVIDIA H100 data sheet, column SXM; half of the 1,979 TFLOP/s with sparsity",
    ),
    DeviceSpec(
        slug="nvidia-h100-pcie",
        title="NVIDIA H100 PCIe 80GB",
        pattern=r"H100 PCIe",
        arch="sm_90",
        memory_bytes=80 * 10**9,
        bandwidth_gb_s=2000,
        tflop_s=756,
        shared_memory_bytes=227 << 10,
        source="NVIDIA H100 data sheet, column PCIe; half of the 1,513 TFLOP/s with sparsity",
    ),
    DeviceSpec(
        slug="nvidia-h200",
        title="NVIDIA H200 SXM 141GB",
        pattern=r"H200\b(?! NVL)",
        arch="sm_90",
        memory_bytes=141 * 10**9,
        bandwidth_gb_s=4800,
        tflop_s=989,
        shared_memory_bytes=227 << 10,
        source="NVIDIA H200 data sheet, column SXM; half of the 1,979 TFLOP/s with sparsity",
    ),
)
