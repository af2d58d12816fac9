"""Launches that begin while the one before them ends: programmatic dependent launch, from compute capability 9.0 on.

A kernel launched with `**pdl_launch(device)` may start before the launches ahead of it are done. Before it calls
`wait(PDL)`, it may read only what no launch of a step writes: weights, norm weights, biases, taps. Every program of
every such kernel waits, so a complete launch says that all launches before it are complete. After `wait`, a kernel sees
everything that earlier launches wrote, whatever kernels (our own, torch's, cuBLAS's) they were.

What is read before `wait` must have been written before the last ordinary launch or synchronisation: packing weights
(nasbench.model.packed) therefore synchronises the device.

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
    """The major compute capability of a GPU; 0 without a GPU, and under the interpreter."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def pdl_launch(device: torch.device) -> dict[str, int | bool]:
    """Launch keywords of every kernel of a step: its constant PDL, and the launch attribute where the card has it."""
    if not _allowed or capability(device) < FIRST_CAPABILITY:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@contextmanager
def without_pdl() -> Iterator[None]:
    """For tests and measurements: launches (and captures) inside wait for the launch ahead to end."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@triton.jit
def prefetch(pointers):
    """Asks the second-level cache for the lines of these addresses. For launches with PDL, before `wait`: shared memory
    cannot be filled ahead of a pipelined loop, which fills it in its own order."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait(PDL: tl.constexpr):
    """Returns when all earlier launches are done, and lets the next launch start. Every program calls it once, with all
    of its threads.

    So all launches but the one just ahead are done when a kernel starts. Letting the next one start before the wait
    gained less than one hundredth of a step on an H100, and would take that promise away.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
