"""Launches that begin while the one before them ends: programmatic dependent launch, from compute capability 9.0 on.

A kernel launched with `**dependent(device)` may start before the launches ahead of it are done. It may then read what
no launch of a step writes (weights, norm weights, biases, taps), so that these are on their way when its turn comes,
and calls `follow(PDL)` before it touches anything else, be it to read or to write. Every program of every such kernel
calls it, so a launch that is complete says that all before it are: after `follow`, earlier launches are done and what
they wrote is seen, whatever kernels (our own, torch's, cuBLAS's) they were.

What is read before `follow` must have been written before the last ordinary launch or synchronisation: stacking
weights (nasbench.model.packed) therefore waits for the device.

CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
import triton.language as tl

FIRST_CAPABILITY = 9
_allowed = True


@cache
def capability(device: torch.device) -> int:
    """The major compute capability of a GPU; 0 of what is none, and under the interpreter."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def dependent(device: torch.device) -> dict[str, int | bool]:
    """Launch keywords of every kernel of a step: its constant PDL, and the launch attribute where the card has it."""
    if not _allowed or capability(device) < FIRST_CAPABILITY:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@contextmanager
def without_overlap() -> Iterator[None]:
    """For tests and measurements only: what is launched, or captured in a graph, inside waits for what is ahead."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@triton.jit
def fetch(pointers):
    """Asks for the lines of the second-level cache that these addresses lie in. For launches with PDL, before `follow`:
    shared memory cannot be filled there ahead of a pipelined loop, which fills it in its own order."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def follow(PDL: tl.constexpr):
    """Returns when all earlier launches are done; the next one may start then. To be called once by every program, by
    all of its threads.

    So all launches but the one just ahead are done when a kernel starts. Letting the next one start before the wait
    gained less than one hundredth of a step on an H100, and would take that promise away.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
