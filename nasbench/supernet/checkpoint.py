"""Checkpoints that are whole or absent: a folder per checkpoint, renamed into place, and a pointer to the newest.

    supernet/latest.json            {"checkpoint": "align-00000040"}
    supernet/align-00000040/        supernet.safetensors, optimizer.safetensors, state.json
                                    moments/ where the weights were shared out (nasbench.supernet.sharded_checkpoint)

A kill at any moment leaves the pointer at a complete folder. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nasbench.core.errors import UserError
from nasbench.core.files import machine_errors, read_json, write_json

WEIGHTS, OPTIMIZER, STATE, LATEST = "supernet.safetensors", "optimizer.safetensors", "state.json", "latest.json"
MOMENTS = "moments"


def digest(path: Path) -> str:
    """Names a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: where it lies.
        state: what `save` was given, with the digests of the tensor files.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def version(self) -> str:
        """Names the weights: equal versions have equal weights."""
        return str(self.state["digests"][WEIGHTS])

    def weights(self, device: str = "cpu") -> dict[str, Tensor]:
        """The weights by name. Raises UserError when the file is not what was written."""
        return self._load(WEIGHTS, device)

    def optimizer(self, device: str = "cpu") -> dict[str, Tensor]:
        """The optimiser's tensors by name."""
        return self._load(OPTIMIZER, device)

    def _load(self, name: str, device: str) -> dict[str, Tensor]:
        path = self.folder / name
        try:
            if digest(path) != self.state["digests"].get(name):
                raise UserError(f"{path} is corrupt (its checksum is wrong): {_remedy(self.folder.parent)}")
            return load_file(path, device=device)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is corrupt ({error}): {_remedy(self.folder.parent)}") from None


def _remedy(folder: Path) -> str:
    return f"delete {folder} and distil again"


def save(
    folder: Path,
    name: str,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    moments: Path | None = None,
) -> Checkpoint:
    """Writes checkpoint `name` into `folder`, points `latest.json` at it, then removes the older ones.

    Args:
        moments: a folder on the same disk that becomes the checkpoint's own.

    Raises MachineError when the disk refuses; the older checkpoint is then still there.
    """
    target, temporary = folder / name, folder / f".{name}.tmp"
    with machine_errors(f"writing {target}"):
        folder.mkdir(parents=True, exist_ok=True)
        for path in (target, temporary):
            shutil.rmtree(path, ignore_errors=True)
        try:
            temporary.mkdir()
            digests = {}
            for file, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
                try:
                    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary / file)
                except SafetensorError as error:
                    raise OSError(str(error)) from None
                _flush(temporary / file)
                digests[file] = digest(temporary / file)
            if moments is not None:
                moments.replace(temporary / MOMENTS)
            full = {**state, "digests": digests}
            write_json(temporary / STATE, full)
            temporary.replace(target)
            _flush(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    write_json(folder / LATEST, {"checkpoint": name})
    for old in folder.iterdir():
        if old.is_dir() and old != target:
            shutil.rmtree(old, ignore_errors=True)
    return Checkpoint(target, full)


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, None when there is none yet. Raises UserError for a damaged one."""
    if not (folder / LATEST).is_file():
        return None
    try:
        target = folder / str(read_json(folder / LATEST)["checkpoint"])
        state = read_json(target / STATE)
        if not isinstance(state["digests"][WEIGHTS], str):
            raise TypeError("bad digest")
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{folder / LATEST} points at no complete checkpoint ({error}): {_remedy(folder)}") from None
    return Checkpoint(target, state)


def discard(folder: Path) -> None:
    """Removes the checkpoints of a training that is over; losses.csv stays."""
    (folder / LATEST).unlink(missing_ok=True)
    if folder.is_dir():
        for old in folder.iterdir():
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
