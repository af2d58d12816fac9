"""Sizes as people write them, and the folders that nasbench uses."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nasbench.core.errors import UserError

_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "b": 1}
MOST = 1 << 62
"""No size is larger: a tensor's would not be a 64-bit number."""
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def is_count(text: str) -> bool:
    """Whether a text is a whole number, of at most 18 digits: longer ones are refused by Python, or overflow."""
    return text.isdecimal() and len(text) <= 18


def parse_size(text: str | int) -> int:
    """`4k` -> 4096, `64MiB` -> 67108864, `128` -> 128. Raises UserError for anything else, zero included."""
    match = _SIZE.fullmatch(str(text))
    scale = _BINARY.get(match[2].lower()) if match else None
    value = float(match[1]) * scale if match and scale else 0.0
    if not 1 <= value <= MOST or value != int(value):
        raise UserError(
            f"bad size {str(text)[:40]!r}: write a positive whole number with an optional unit, as 128, 4k, 64MiB"
        )
    return int(value)


def parse_budget(text: str) -> int:
    """As parse_size, and `0` -> 0."""
    return 0 if text == "0" else parse_size(text)


def parse_sizes(text: str) -> list[int]:
    """`"4k,64k"` -> [4096, 65536], sorted, without repeats."""
    return sorted({parse_size(part) for part in text.split(",") if part.strip()})


def format_size(value: int) -> str:
    """4096 -> `4k`, 65536 -> `64k`, 1000 -> `1000`: the inverse of parse_size for token counts."""
    return f"{value >> 10}k" if value >= 1024 and value % 1024 == 0 else str(value)


def cache_dir() -> Path:
    """Where downloaded models and tokenised text are kept: $NASBENCH_CACHE or the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ["NASBENCH_CACHE"]) if os.environ.get("NASBENCH_CACHE") else user_cache_path("nasbench")


def profiles_dir() -> Path:
    """The folder of the shipped profile databases: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parents[1] / "_profiles"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "profiles"
