"""Several processes that train one supernet: each takes its rows of every batch; gradients and losses are summed.

Only the mixers learn, and they are small: every process holds them and the frozen teacher, unless FSDP shards the
weights (nasbench.parallel.fsdp). A checkpoint does not depend on the number of processes, and a run may go on with
another number. `torchrun` starts the processes and numbers them in the environment.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from nasbench.core.errors import UserError
from nasbench.data.packing import Batch


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

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes."""
        if self.size > 1:
            for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
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


@contextmanager
def dist_context(device: str) -> Iterator[tuple[DistContext, str]]:
    """Joins the processes that torchrun started, if it did: yields this one and its device, `cuda:<local rank>` where
    `device` is cuda."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE, device
        return
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", device_id=torch.device(device) if cuda else None)
    try:
        yield DistContext(distributed.get_rank(), size), device
    finally:
        distributed.destroy_process_group()
        # Gloo's threads end with the last reference to their group, and abort a process that ends before them. Sharded
        # weights hold such references, in cycles.
        gc.collect()
