"""The gated delta rule: truth, chunked-parallel form, one decode step."""

from nasbench_kernels.gated_delta.chunked import chunked_gated_delta
from nasbench_kernels.gated_delta.naive import naive_gated_delta
from nasbench_kernels.gated_delta.step import gated_delta_step

__all__ = ["chunked_gated_delta", "gated_delta_step", "naive_gated_delta"]
