"""Short causal depthwise convolution, then SiLU, in plain PyTorch. Importing it needs no triton."""

from nasbench_kernels.conv.naive import naive_short_conv
from nasbench_kernels.conv.plain import short_conv, short_conv_step

__all__ = ["naive_short_conv", "short_conv", "short_conv_step"]
