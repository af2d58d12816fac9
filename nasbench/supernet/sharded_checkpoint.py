"""Checkpoints of runs whose weights are shared out to processes, readable by any number of them.

Weights are gathered to the first process, one parameter after another, and written as ever (`supernet.safetensors`):
what comes after training knows nothing of shares. Adam's moments, twice as large and needed to go on only, are never
gathered: torch.distributed.checkpoint writes each process's shares into `moments/`, as safetensors with their places,
and reads the parts that another number of processes needs, one process without shards among them. Parameters that are
whole everywhere, step counts and sums of losses stand in `optimizer.safetensors`.

The shares are written beside the checkpoint and moved into it before it gets its name: a kill leaves the last one. All
processes write into one folder, so that several hosts need a file system in common.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import machine_errors
from nasbench.parallel.context import DistContext
from nasbench.parallel.fsdp import full_state_dict, is_sharded, local, sharded_like
from nasbench.supernet import checkpoint
from nasbench.supernet.checkpoint import MOMENTS, Checkpoint, digest
from nasbench.supernet.optimizer import MasterAdamW


def save(
    folder: Path,
    name: str,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    workers: DistContext,
) -> Checkpoint:
    """`checkpoint.save`, of tensors that may be shared out: all processes call it then, else the first alone.

    Raises MachineError in every process when the disk refuses in one; the older checkpoint is then still there.
    """
    if not any(is_sharded(tensor) for tensor in (*weights.values(), *optimizer.values())):
        return checkpoint.save(folder, name, weights, optimizer, state)
    shares: dict[str, Tensor] = {key: tensor for key, tensor in optimizer.items() if is_sharded(tensor)}
    rest = {key: tensor for key, tensor in optimizer.items() if key not in shares}
    device = local(next(tensor for tensor in weights.values() if is_sharded(tensor))).device
    moments = folder / f".{name}.moments"
    error: MachineError | None = None
    digests: dict[str, str] = {}
    if shares:
        try:
            digests = _write(moments, shares, workers)
        except MachineError as refused:
            error = refused
    whole = full_state_dict(weights, workers.is_main)
    _agree(error, workers, device)
    saved = Checkpoint(folder / name, {**state, "digests": {checkpoint.WEIGHTS: "elsewhere"}})
    if workers.is_main:
        try:
            given = {**state, "moments": digests} if shares else state
            saved = checkpoint.save(folder, name, whole, rest, given, moments if shares else None)
        except MachineError as refused:
            error = refused
    _agree(error, workers, device)
    return saved


def _agree(error: MachineError | None, workers: DistContext, device: torch.device) -> None:
    """Raises in every process what happened in one, so that nobody waits for it."""
    if workers.any(error is not None, device):
        raise error or MachineError("another process could not write its part of the checkpoint")


def _write(folder: Path, shares: dict[str, Tensor], workers: DistContext) -> dict[str, str]:
    """Every process's shares into a folder. Names and digests of the files."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as write
    from torch.distributed.checkpoint.api import CheckpointException

    if workers.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    workers.any(False, local(next(iter(shares.values()))).device)  # nobody writes before the old ones are gone
    with machine_errors(f"writing {folder}"):
        try:
            write(shares, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
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
    device = optimizer.device
    tensors = saved.optimizer("cpu" if optimizer.sharded else str(device))
    files: dict[str, str] = saved.state.get("moments", {})
    if not files:
        return tensors
    folder = saved.folder / MOMENTS
    own = list(files)[workers.rank :: workers.size]
    if workers.any(not all((folder / n).is_file() and digest(folder / n) == files[n] for n in own), device):
        raise UserError(f"{folder} is corrupt (a checksum is wrong): delete {saved.folder.parent} and distil again")
    return {**tensors, **_read(folder, optimizer, workers)}


def _read(folder: Path, optimizer: MasterAdamW, workers: DistContext) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as read

    reader = HuggingFaceStorageReader(str(folder))
    moments = {}
    for key in reader.read_metadata().state_dict_metadata:
        name = key.split(":", 1)[1]
        if name in optimizer.masters:
            moments[key] = sharded_like(optimizer.working[name], torch.zeros_like(optimizer.masters[name].detach()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads alone
        read(moments, storage_reader=reader, no_dist=workers.size == 1)
    return moments
