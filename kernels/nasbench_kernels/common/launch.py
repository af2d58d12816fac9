"""How kernels choose their launches: the card's limits, and the tuner's choice where there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

LIBRARY = "library"
"""A choice: leave the product to cuBLAS."""


class LaunchKey(NamedTuple):
    """What a launch is chosen for: the operation, its variant, and its sizes."""

    op: str
    variant: str
    sizes: tuple[int, ...]


_tuned: Mapping[LaunchKey, Any] = {}
_asked: Counter[tuple[LaunchKey, Any]] | None = None


@cache
def sm_limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory each) of a GPU; under the interpreter a tiny one, so that tests see both
    whole and split work."""
    if device.type != "cuda":
        return 1, 100 << 10
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


def launch_for(op: str, variant: str, sizes: tuple[int, ...], default: Callable[[], Any]) -> Any:
    """The tuner's launch for these sizes, else `default()`."""
    key = LaunchKey(op, variant, sizes)
    found = _tuned[key] if key in _tuned else default()
    if _asked is not None:
        _asked[key, found] += 1
    return found


@contextmanager
def tuned(launches: Mapping[LaunchKey, Any]) -> Iterator[None]:
    """Launches and captures inside use these choices, which may change meanwhile."""
    global _tuned
    before, _tuned = _tuned, launches
    try:
        yield
    finally:
        _tuned = before


@contextmanager
def recorded() -> Iterator[Counter[tuple[LaunchKey, Any]]]:
    """Counts the choices made inside."""
    global _asked
    before, _asked = _asked, Counter()
    try:
        yield _asked
    finally:
        _asked = before
