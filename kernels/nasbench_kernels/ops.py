# ruff: noqa: F401
"""Every operation that has a Triton kernel, in one namespace. Importing it imports triton, and needs no GPU."""

from nasbench_kernels.attention.decode import decode_attention
from nasbench_kernels.conv.decode import conv_step
from nasbench_kernels.conv.train import triton_short_conv
from nasbench_kernels.gated_delta.decode import StepForm, StepWorkspace, recurrent_step
from nasbench_kernels.gated_delta.inputs import recurrence_inputs, training_inputs
from nasbench_kernels.gated_delta.prefill import triton_gated_delta
from nasbench_kernels.linear.gemm import gemm, gemm_and_silu, swiglu_gemm
from nasbench_kernels.linear.gemv import gemv
from nasbench_kernels.linear.grouped import grouped_gemm
from nasbench_kernels.linear.launch import prefer_skinny_gemm, skinny_gemm_supported
from nasbench_kernels.loss.divergence import divergence_rows
from nasbench_kernels.norm.decode import add_norm
from nasbench_kernels.norm.train import gated_norm
from nasbench_kernels.rotary.decode import rotary_write
from nasbench_kernels.rotary.train import rotary
from nasbench_kernels.sampling.argmax import argmax
from nasbench_kernels.swiglu.kernel import silu_part, swiglu
