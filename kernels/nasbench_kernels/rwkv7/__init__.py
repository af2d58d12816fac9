"""The recurrence of RWKV7 (arXiv 2503.14456): truth, chunked-parallel form, one decode step."""

from nasbench_kernels.rwkv7.chunked import chunked_rwkv7, rwkv7_step
from nasbench_kernels.rwkv7.naive import naive_rwkv7

__all__ = ["chunked_rwkv7", "naive_rwkv7", "rwkv7_step"]
