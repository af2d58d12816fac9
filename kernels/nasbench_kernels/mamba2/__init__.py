"""The recurrence of Mamba2 (arXiv 2405.21060): truth, chunked-parallel form, one decode step."""

from nasbench_kernels.mamba2.chunked import chunked_mamba2, mamba2_step
from nasbench_kernels.mamba2.naive import naive_mamba2

__all__ = ["chunked_mamba2", "mamba2_step", "naive_mamba2"]
