"""Atomic writes, locks, and errors of the system in one line."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nasbench.core.errors import MachineError, UserError


@contextmanager
def machine_errors(doing: str) -> Iterator[None]:
    """Turns an OSError inside into a MachineError of one line: `doing` says what was tried, e.g. "writing x.csv"."""
    try:
        yield
    except OSError as error:
        reason = {errno.ENOSPC: "no space left on the disk", errno.EACCES: "permission denied"}.get(
            error.errno or 0, error.strerror or str(error)
        )
        raise MachineError(f"{doing}: {reason}") from error


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it over `path` when the block ends well, removes it when not.

    The file and the rename are flushed to the disk, so that a crash leaves the old file or the new one, whole.
    Raises MachineError when the folder cannot be made or written.
    """
    path = Path(path)
    with machine_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            flush(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
            flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process that locks `path` runs inside of the block. The system frees the lock of a process that dies.

    Raises MachineError when the folder cannot be made or written.
    """
    from filelock import FileLock

    path = Path(path)
    with machine_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def strict_json(data: Any) -> str:
    """One line of strict JSON: numbers that are not finite become null."""

    def known(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: known(value) for key, value in item.items()}
        if isinstance(item, (list, tuple)):
            return [known(value) for value in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(known(data), allow_nan=False)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically, keys in the order given."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises UserError naming the file when it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
