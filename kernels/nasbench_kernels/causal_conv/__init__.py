"""Short causal depthwise convolution with static kernels, then SiLU."""

from nasbench_kernels.causal_conv.naive import naive_causal_conv
from nasbench_kernels.causal_conv.vectorised import causal_conv, causal_conv_step

__all__ = ["causal_conv", "causal_conv_step", "naive_causal_conv"]
