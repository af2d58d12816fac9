"""nasbench: search hybrid-attention placements of a pre-trained LLM by what the target device really does."""

__version__ = "0.1.0"

from nasbench.runtime.on_import import watch

watch()
