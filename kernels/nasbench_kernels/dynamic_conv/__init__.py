"""Short causal depthwise convolution with a kernel per token, then SiLU."""

from nasbench_kernels.dynamic_conv.naive import naive_dynamic_conv
from nasbench_kernels.dynamic_conv.vectorised import dynamic_conv, dynamic_conv_step

__all__ = ["dynamic_conv", "dynamic_conv_step", "naive_dynamic_conv"]
