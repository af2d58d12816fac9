"""The gated delta rule in plain PyTorch: truth, chunked form, one decode step. Importing it needs no triton."""

from nasbench_kernels.gated_delta.chunked import chunked_gated_delta, gated_delta_step
from nasbench_kernels.gated_delta.naive import RowLayout, naive_gated_delta

__all__ = ["RowLayout", "chunked_gated_delta", "gated_delta_step", "naive_gated_delta"]
