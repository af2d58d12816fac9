"""The search: a candidate takes the place of the present launch in a whole step, and stays if the step is shorter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nasbench_kernels.common.launch import LaunchKey
from nasbench_kernels.tune.candidates import CLOSE, error, neighbours

KEEP = 0.0015
"""Share of a step that a launch must save to be kept."""


def climb(
    keys: Sequence[LaunchKey], launches: dict[LaunchKey, Any], ms: Callable[[], float], left: Callable[[], float],
    say: Callable[[str], None], device: torch.device,
) -> float:  # fmt: skip
    """Goes from launch to better neighbour until none is better, and returns the milliseconds of a step at the end.

    A launch that is faster alone need not be faster in a step, where its start overlaps the launch ahead and its end
    the next one. A candidate that is ahead is timed again beside the present launch, since a card's clock drifts.

    Args:
        launches: the present ones, changed in place.
        ms: of a captured step with these launches.
        left: seconds.
    """
    now = ms()
    for key in keys:
        say(f"{key.op} {key.variant} {key.sizes}: {launches[key]}")
        tried, better = {launches[key]}, True
        now = ms()
        while better:
            better = False
            for candidate in neighbours(key, launches[key], device):
                if candidate in tried:
                    continue
                tried.add(candidate)
                if left() <= 0:
                    say("the seconds are over")
                    return now
                if not (wrong := error(key, candidate, device)) < CLOSE:
                    say(f"    {candidate}: left out, {wrong:.1e} away from fp32")
                    continue
                before, launches[key] = launches[key], candidate
                found = ms()
                if found < now * (1 - KEEP):
                    launches[key] = before
                    now = ms()
                    launches[key] = candidate
                    found = max(found, ms())
                better = found < now * (1 - KEEP)
                say(f"    {candidate}: {found:.3f} ms, before {now:.3f}{', kept' if better else ''}")
                if better:
                    now = found
                    break
                launches[key] = before
    return ms()
