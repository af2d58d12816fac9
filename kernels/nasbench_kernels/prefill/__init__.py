"""Triton kernels of prefill and training. Imported only where triton is; importing it needs no GPU."""

from nasbench_kernels.dynamic_conv.kernel import conv_part, triton_short_conv
from nasbench_kernels.gated_delta.kernel import triton_gated_delta
from nasbench_kernels.prefill.pointwise import gated_norm, rule_inputs

__all__ = ["conv_part", "gated_norm", "rule_inputs", "triton_gated_delta", "triton_short_conv"]
