"""Requests that begin alike: what is read once for several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nasbench.core.by_device import ByDevice

BLOCK = ByDevice(cpu=32, cuda=128)
"""A shared prefix is a multiple of this many tokens, so that prefixes of different groups are often equally long and
are read at once. On a GPU a second pass takes longer than a few tokens more."""


@dataclass(frozen=True)
class Group:
    """Rows that share their first `prefix` tokens; of a row alone, `prefix` is 0."""

    rows: tuple[int, ...]
    prefix: int


def shared_prefixes(rows: Sequence[tuple[int, ...]], most: Sequence[int], block: int) -> list[Group]:
    """Divides rows of token ids into groups whose prefixes save the most tokens.

    Args:
        most: tokens of each row that may stand in a prefix.
        block: what prefixes are multiples of.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    shared = [_common(rows[one], rows[other], min(most[one], most[other]), block) for one, other in pairwise(order)]
    return [Group(tuple(order[first : last + 1]), prefix) for first, last, prefix in _divide(shared, 0, len(rows) - 1)]


def _common(one: tuple[int, ...], other: tuple[int, ...], most: int, block: int) -> int:
    """Tokens with which both begin, in whole blocks, at most `most`."""
    length = 0
    while length + block <= most and one[length : length + block] == other[length : length + block]:
        length += block
    return length


def _divide(shared: Sequence[int], first: int, last: int) -> list[tuple[int, int, int]]:
    """(first row, last row, prefix) of each group of sorted rows; shared[i] is what rows i and i + 1 have in common."""
    if first >= last:
        return [(first, first, 0)] if first == last else []
    least = min(shared[first:last])
    starts = [first, *(i + 1 for i in range(first, last) if shared[i] == least), last + 1]
    parts = [part for begin, end in pairwise(starts) for part in _divide(shared, begin, end - 1)]
    saved = sum((end - begin) * prefix for begin, end, prefix in parts)
    return parts if saved > (last - first) * least or least == 0 else [(first, last, least)]
