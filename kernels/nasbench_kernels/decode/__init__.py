"""Triton kernels of one decode step. Imported only where triton is; importing it needs no GPU."""

from nasbench_kernels.decode.argmax import argmax
from nasbench_kernels.decode.attention import decode_attention, rotary_write
from nasbench_kernels.decode.gemv import gemv
from nasbench_kernels.decode.pointwise import add_norm, conv_step, silu_part, swiglu
from nasbench_kernels.decode.product import batch_product, product_and_silu, swiglu_product
from nasbench_kernels.decode.product_launch import fits, streams
from nasbench_kernels.decode.recurrent import RowLayout, StepWorkspace, recurrent_step

__all__ = [
    "RowLayout",
    "StepWorkspace",
    "add_norm",
    "argmax",
    "batch_product",
    "conv_step",
    "decode_attention",
    "fits",
    "gemv",
    "product_and_silu",
    "recurrent_step",
    "rotary_write",
    "silu_part",
    "streams",
    "swiglu",
    "swiglu_product",
]
