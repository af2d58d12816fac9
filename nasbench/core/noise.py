"""When a measurement counts as noisy. Imports no torch."""

from __future__ import annotations

SPREAD = 0.03
"""A measurement whose p80 - p20 exceeds this share of its p50 is noisy."""


def is_noisy(p20_us: float | None, p50_us: float | None, p80_us: float | None) -> bool | None:
    """Whether the percentiles lie further apart than SPREAD allows; None without them."""
    if p20_us is None or p50_us is None or p80_us is None:
        return None
    return p80_us - p20_us > SPREAD * p50_us
