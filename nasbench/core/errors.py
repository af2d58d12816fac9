"""The errors that reach a person. Each is one line that names the bad value and the legal ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NasbenchError(Exception):
    """Base of everything nasbench raises on purpose. `exit_code` is what the command line returns.

    The message stays one line whatever names from a user's files stand in it.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))

    def __str__(self) -> str:
        """One line, whatever the bad value held."""
        return " ".join(super().__str__().split())


class MachineError(NasbenchError):
    """The machine is at fault (full disk, unwritable folder, absent device, network): exit code 1."""


class UserError(NasbenchError, ValueError):
    """The user's input is wrong (unknown name, bad size, corrupt file): exit code 2."""

    exit_code = 2


def unknown(what: str, value: object, legal: Iterable[object]) -> UserError:
    """`UserError` for a value outside a closed set: names the value, the legal ones and the nearest match."""
    names = sorted(str(name) for name in legal)
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(value).lower(), list(lowered), n=1, cutoff=0.5)
    nearest = f"; did you mean {lowered[close[0]]!r}?" if close else ""
    return UserError(f"unknown {what} {str(value)!r}: choose from {', '.join(names)}{nearest}")
