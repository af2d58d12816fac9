"""Atomic writes, locks, and errors of the system in one line."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nasbench.core.errors import MachineError, UserError

LOCK = ".writer.lock"
_PLAIN_NAME = re.compile(r"[\w@+-][\w.@+-]{0,199}")


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


def plain_name(what: str, text: object) -> str:
    """A name that a file may have given, fit to be a file's or folder's own. Raises UserError for one with a path."""
    if not isinstance(text, str) or not _PLAIN_NAME.fullmatch(text):
        raise UserError(f"bad {what} {text!r}: a name has letters, digits, _ . @ + - and does not begin with a dot")
    return text


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _claim(path: Path) -> int | None:
    """A handle that keeps others from claiming the path; None where a living writer has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _temporary(path: Path, folder: bool) -> tuple[Path, int]:
    """A new `.NAME.*.tmp` beside `path`, and the handle that claims it."""
    place: dict[str, Any] = {"prefix": f".{path.name}.", "suffix": ".tmp", "dir": path.parent}
    while True:
        if folder:
            made = Path(tempfile.mkdtemp(**place))
        else:
            unused, name = tempfile.mkstemp(**place)
            os.close(unused)
            made = Path(name)
        # Another process may take it for a dead writer's until it is claimed.
        with suppress(FileNotFoundError):
            handle = _claim(made)
            if handle is not None:
                if made.exists():
                    return made, handle
                os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "", *, deep: bool = False) -> None:
    """Removes what killed writers of `name`, or of everything, left in a folder: a living one has claimed its file."""
    pattern = f".{glob.escape(name)}.*.tmp" if name else ".*.tmp"
    for left in list(folder.rglob(pattern) if deep else folder.glob(pattern)):
        with suppress(OSError):  # another process sweeps, too
            if (handle := _claim(left)) is not None:
                _remove(left)
                os.close(handle)


def usual_mode(path: Path) -> None:
    """Gives a file or folder the rights that a new one has: temporary ones are their owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def atomic_path(path: Path, *, folder: bool = False, scratch: bool = False) -> Iterator[Path]:
    """Yields a temporary file beside `path`; renames it over `path` when the block ends well, removes it when not.

    The file and the rename are flushed to the disk, so that a crash leaves the old file or the new one, whole. What a
    killed process leaves is removed when the same path is written again.

    Args:
        folder: a folder with everything in it; an old one is replaced.
        scratch: the file is in a folder of its own meanwhile, for a library that makes others beside it.

    Raises MachineError when the folder around it cannot be made or written.
    """
    path = Path(path)
    with machine_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        made, handle = _temporary(path, folder or scratch)
        try:
            temporary = made / path.name if scratch else made
            yield temporary
            for written in temporary.rglob("*") if folder else [temporary]:
                flush(written)
            usual_mode(temporary)
            if folder:
                shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
            _remove(made)
            flush(path.parent)
        finally:
            _remove(made)
            os.close(handle)


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


@contextmanager
def sole(lock: Path, told: str) -> Iterator[None]:
    """One process at a time has this lock file; the system frees the lock of a process that dies.

    Raises UserError with `told` at once where another process has it, MachineError where it cannot be made.
    """
    from filelock import FileLock, Timeout

    with machine_errors(f"writing {lock.parent}"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise UserError(told) from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def sole_writer(folder: Path, doing: str) -> Iterator[None]:
    """Lets one process at a time write into a folder, and removes what killed ones left there.

    Args:
        doing: for the message, as "distils".

    Raises as `sole`.
    """
    try:
        with sole(folder / LOCK, f"another process {doing} in {folder}: wait for its end, or choose another folder"):
            sweep(folder, deep=True)
            yield
    finally:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing came of it
            shutil.rmtree(folder, ignore_errors=True)


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
    """Writes JSON atomically, keys in the order given. Raises MachineError for a number that is not finite."""
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except ValueError as error:
        raise MachineError(f"a number for {path} is not finite: {error}") from None
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises UserError naming the file when it is absent or not JSON."""
    return _parsed(path, json.loads, "JSON")


def read_toml(path: Path) -> dict[str, Any]:
    """Reads TOML. Raises UserError naming the file when it is absent or not TOML."""
    found: dict[str, Any] = _parsed(path, tomllib.loads, "TOML")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object, {} where there is no file. Raises UserError naming the file when it is something else."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: remove it")
    return found


@contextmanager
def damaged(path: Path, advice: str = "remove it") -> Iterator[None]:
    """Turns what goes wrong with the contents of a file that nasbench wrote into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}): {advice}") from None


def _parsed(path: Path, parse: Callable[[str], Any], kind: str) -> Any:
    try:
        with machine_errors(f"reading {path}"):
            if not path.is_file():
                raise UserError(f"no such file: {path}")
            return parse(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid {kind}: {error}") from None
