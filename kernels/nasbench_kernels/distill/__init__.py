"""Triton kernels of distillation steps. Imported only where triton is; importing it needs no GPU."""

from nasbench_kernels.distill.divergence import divergence_rows
from nasbench_kernels.distill.rule import gated_norm, rule_inputs
from nasbench_kernels.distill.streams import rotary, swiglu

__all__ = ["divergence_rows", "gated_norm", "rotary", "rule_inputs", "swiglu"]
