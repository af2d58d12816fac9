"""What launch configurations ask of a card."""

from __future__ import annotations

from functools import cache

import torch


@cache
def card(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory each) of a GPU; under the interpreter a tiny one, so that tests see both
    whole and divided work."""
    if device.type != "cuda":
        return 1, 100 << 10
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor
