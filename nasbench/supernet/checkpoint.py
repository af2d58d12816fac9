"""Checkpoints that are whole or absent: a folder per checkpoint, renamed into place, and a pointer to the newest.

    supernet/latest.json            {"checkpoint": "align-00000040"}
    supernet/align-00000040/        supernet.safetensors, optimizer.safetensors, state.json
                                    moments/ of sharded weights

A kill at any moment leaves the pointer at a complete folder. Nothing is pickled.

Any number of processes reads a checkpoint of sharded weights. The first process gathers the weights, one parameter
after another, and writes them as ever. Nobody gathers Adam's moments, which are twice as large and serve only to go on:
torch.distributed.checkpoint writes each process's shards into `moments/` and reads the parts that another number of
processes needs. `optimizer.safetensors` has the whole parameters' moments, step counts and sums of losses. All
processes write into one folder: several hosts need a file system in common.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, distributed

from nasbench.checkpoints.tensors import save_tensors
from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import atomic_path, machine_errors, plain_name, read_json, write_json
from nasbench.parallel.context import SINGLE, DistContext
from nasbench.parallel.fsdp import full_state_dict, is_sharded, local, sharded_like
from nasbench.supernet.optimizer import MasterAdamW

WEIGHTS, OPTIMIZER, STATE, LATEST = "supernet.safetensors", "optimizer.safetensors", "state.json", "latest.json"
MOMENTS = "moments"


def digest(path: Path) -> str:
    """Names a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
        return self.load(WEIGHTS, device)

    def load(self, name: str, device: str) -> dict[str, Tensor]:
        """The tensors of one file."""
        path = self.folder / name
        try:
            if digest(path) != self.state["digests"].get(name):
                raise UserError(f"{path} is corrupt (its checksum is wrong): {_advice(self.folder.parent)}")
            return load_file(path, device=device)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is corrupt ({error}): {_advice(self.folder.parent)}") from None


def _advice(folder: Path) -> str:
    return f"delete {folder} and distil again"


def save(
    folder: Path,
    name: str,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    workers: DistContext = SINGLE,
) -> Checkpoint:
    """Writes checkpoint `name` into `folder`, points `latest.json` at it, then removes the older ones. All processes
    call it.

    Raises MachineError in every process when the disk refuses in one; the older checkpoint is then still there.
    """
    shards: dict[str, Tensor] = {key: tensor for key, tensor in optimizer.items() if is_sharded(tensor)}
    sharded = next((tensor for tensor in (*weights.values(), *shards.values()) if is_sharded(tensor)), None)
    elsewhere = Checkpoint(folder / name, {**state, "digests": {WEIGHTS: "elsewhere"}})
    if sharded is None:
        return _write(folder, name, weights, optimizer, state) if workers.is_main else elsewhere
    device = local(sharded).device
    moments = folder / f".{name}.moments" if shards else None
    with _one_outcome(workers, device):
        if moments is not None:
            state = {**state, "moments": _write_moments(moments, shards, workers, device)}
    whole = full_state_dict(weights, workers.is_main)
    with _one_outcome(workers, device):
        if workers.is_main:
            own = {key: tensor for key, tensor in optimizer.items() if key not in shards}
            return _write(folder, name, whole, own, state, moments)
    return elsewhere


@contextmanager
def _one_outcome(workers: DistContext, device: torch.device) -> Iterator[None]:
    """Raises in every process what happened inside in one, so that nobody waits for it."""
    error: MachineError | None = None
    try:
        yield
    except MachineError as refused:
        error = refused
    if workers.any(error is not None, device):
        raise error or MachineError("another process could not write its part of the checkpoint")


def _write(
    folder: Path,
    name: str,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    moments: Path | None = None,
) -> Checkpoint:
    """`moments` is a folder on the same disk that becomes the checkpoint's own."""
    target = folder / name
    with atomic_path(target, folder=True) as temporary:
        digests = {}
        for file, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
            save_tensors(temporary / file, tensors)
            digests[file] = digest(temporary / file)
        if moments is not None:
            moments.replace(temporary / MOMENTS)
        sizes = {file: (temporary / file).stat().st_size for file in digests}
        full = {**state, "digests": digests, "sizes": sizes}
        write_json(temporary / STATE, full)
    write_json(folder / LATEST, {"checkpoint": name})
    _remove_folders(folder, target)
    return Checkpoint(target, full)


def _write_moments(
    folder: Path, shards: dict[str, Tensor], workers: DistContext, device: torch.device
) -> dict[str, str]:
    """Every process's shards into a folder. Names and digests of the files."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as write
    from torch.distributed.checkpoint.api import CheckpointException

    if workers.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    workers.wait(device)  # nobody writes before the old ones are gone
    with machine_errors(f"writing {folder}"):
        try:
            write(shards, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        except CheckpointException as error:
            # One line: what went wrong in which process is in its own words.
            raise OSError("; ".join(str(failure[0]) for failure in error.failures.values())) from error
        names = sorted(path.name for path in folder.iterdir())
        own = {name: digest(folder / name) for name in names[workers.rank :: workers.size]}
    parts: list[dict[str, str]] = [{}] * workers.size
    distributed.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def optimizer_of(saved: Checkpoint, optimizer: MasterAdamW, workers: DistContext) -> dict[str, Tensor]:
    """What `MasterAdamW.load_state` takes, of a checkpoint that any number of processes wrote. All of them call it.

    Raises UserError in every process when a file is not what was written.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as read

    tensors = saved.load(OPTIMIZER, "cpu" if optimizer.sharded else str(optimizer.device))
    files: dict[str, str] = saved.state.get("moments", {})
    if not files:
        return tensors
    folder = saved.folder / MOMENTS
    own = list(files)[workers.rank :: workers.size]
    damaged = not all((folder / name).is_file() and digest(folder / name) == files[name] for name in own)
    if workers.any(damaged, optimizer.device):
        raise UserError(f"{folder} is corrupt (its checksum is wrong): {_advice(saved.folder.parent)}")
    reader = HuggingFaceStorageReader(str(folder))
    moments = {}
    for key in reader.read_metadata().state_dict_metadata:
        name = key.split(":", 1)[1]
        if name in optimizer.masters:
            moments[key] = sharded_like(optimizer.working[name], torch.zeros_like(optimizer.masters[name].detach()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads alone
        read(moments, storage_reader=reader, no_dist=workers.size == 1)
    return {**tensors, **moments}


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, None when there is none yet. Raises UserError for a damaged one."""
    if not (folder / LATEST).is_file():
        return None
    try:
        target = folder / plain_name("checkpoint", read_json(folder / LATEST)["checkpoint"])
        state = read_json(target / STATE)
        if not isinstance(state["digests"][WEIGHTS], str) or not isinstance(state.get("moments", {}), dict):
            raise TypeError("bad digest")
        for name in state.get("moments", {}):
            plain_name("file of moments", name)
        sizes = {target / plain_name("file", name): size for name, size in state.get("sizes", {}).items()}
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{folder / LATEST} points at no complete checkpoint ({error}): {_advice(folder)}") from None
    for path, size in sizes.items():  # a digest takes a read of all, which not every command makes
        if (found := path.stat().st_size if path.is_file() else 0) != size:
            raise UserError(f"{path} is corrupt ({found} bytes instead of {size}): {_advice(folder)}")
    return Checkpoint(target, state)


def tidy(folder: Path, saved: Checkpoint | None) -> None:
    """Removes every other folder: what a process that was killed between two writes left."""
    _remove_folders(folder, None if saved is None else saved.folder)


def discard(folder: Path) -> None:
    """Removes the checkpoints of a training that is over; losses.csv stays."""
    (folder / LATEST).unlink(missing_ok=True)
    _remove_folders(folder)


def _remove_folders(folder: Path, keep: Path | None = None) -> None:
    for old in folder.iterdir() if folder.is_dir() else ():
        if old.is_dir() and old != keep:
            shutil.rmtree(old, ignore_errors=True)
