"""Several processes that train one supernet: each takes its rows of every batch; gradients and losses are summed.

Only the mixers learn, and they are small: every process holds them and the frozen teacher, unless FSDP shards the
weights (nasbench.parallel.fsdp). The first process reads the model and gives it to the others. A checkpoint does not
depend on the number of processes, and a run may go on with another number. `torchrun` starts the processes, on one
machine or several, and numbers them in the environment.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from nasbench.core.errors import NasbenchError, UserError
from nasbench.data.packing import Batch

FAILED = "nasbench/failed"
"""Key of the processes' common store: who failed first."""
WATCH_S = 0.5
"""Seconds until the others see it."""


@dataclass(frozen=True)
class DistContext:
    """This process among those that train together.

    Attributes:
        rank: 0-based; rank 0 writes the files.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_rows(self, batch: Batch) -> Batch:
        """This process's rows of a batch. Raises UserError when they do not divide evenly."""
        if self.size == 1:
            return batch
        rows = len(batch.tokens)
        if rows % self.size:
            raise UserError(
                f"a batch of {rows} sequences does not divide over {self.size} processes: "
                f"choose a batch of a multiple of {self.size} sequences"
            )
        return batch.rows(slice(self.rank, None, self.size))

    def some_rows(self, batch: Batch) -> tuple[Batch, bool]:
        """This process's rows of a batch that need not divide evenly, and whether they count. Where there are fewer
        rows than processes, some repeat a row for nothing: all must gather the same shards."""
        if self.rank < len(batch.tokens):
            return batch.rows(slice(self.rank, None, self.size)), True
        return batch.rows(slice(1)), False

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes."""
        if self.size > 1:
            for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                assert work is not None
                work.wait()

    def broadcast(self, tensors: list[Tensor], source: int = 0) -> None:
        """Gives each tensor of the process `source` to all."""
        if self.size > 1:
            for work in [distributed.broadcast(tensor, source, async_op=True) for tensor in tensors]:
                assert work is not None
                work.wait()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process. Waits for the device."""
        if self.size == 1:
            return flag
        total = torch.tensor(float(flag), device=device)
        self.all_reduce([total])
        return bool(total > 0)

    def wait(self, device: torch.device) -> None:
        """Until every process is here."""
        self.any(False, device)


SINGLE = DistContext()


def own_device() -> torch.device:
    """Where this process, one of several, computes."""
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


@contextmanager
def dist_context(device: str) -> Iterator[tuple[DistContext, str]]:
    """Joins the processes that torchrun started, if it did: yields this one and its device, `cuda:<local rank>` where
    `device` is cuda. An error in one process ends all of them (`_Watch`)."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield SINGLE, device
        return
    from torch.distributed.rendezvous import rendezvous

    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    distributed.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=size,
        device_id=torch.device(device) if cuda else None,
    )  # fmt: skip
    watch, context = _Watch(store, rank, size), DistContext(rank, size)
    try:
        yield context, device
        context.wait(torch.device(device))  # the first to leave may take the store along
    except Exception as error:
        watch.fail(error)
    finally:
        watch.end.set()
        watch.join()
        distributed.destroy_process_group()
        # Gloo's threads end with the last reference to their group, and abort a process that ends before them. Sharded
        # weights hold such references, in cycles.
        gc.collect()


class _Watch(threading.Thread):
    """Ends this process when another one has failed: it would wait for it in a sum for minutes. The first one to fail
    says why, in a line; the others have nothing to add to that. torchrun itself names one that was killed."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(daemon=True)
        self.store = store.clone()  # with a connection of its own
        self.where = f"process {rank} of {size} on {socket.gethostname()}"
        self.end, self.told = threading.Event(), False
        self.start()

    def run(self) -> None:
        while not self.end.wait(WATCH_S):
            try:
                failed = self.store.check([FAILED])
            except RuntimeError:
                failed = True  # the process that keeps the store is gone
            if failed:
                self.told = True
                time.sleep(3 * WATCH_S)  # after the one that failed, which torchrun then names
                os._exit(1)

    def fail(self, error: Exception) -> NoReturn:
        """Says what this process failed of, unless another one was first, and ends it. No group is taken down: that
        would wait for the others."""
        self.end.set()
        try:
            first = not self.told and self.store.compare_set(FAILED, "", self.where).decode() == self.where
        except RuntimeError:
            first = True
        if first:
            cause = str(error) if isinstance(error, NasbenchError) else f"{type(error).__name__}: {error}"
            print(f"nasbench: {self.where}: {' '.join(cause.split())}", file=sys.stderr, flush=True)
            time.sleep(2 * WATCH_S)  # this process may keep the store
        os._exit(error.exit_code if isinstance(error, NasbenchError) else 1)
