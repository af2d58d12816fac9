"""Two processes over gloo train what one does, and a run goes on with another number of them."""

import pytest
import torch
from supernet_workers import assert_same, together

from nasbench.core.errors import UserError
from nasbench.data.packing import Batch
from nasbench.parallel.context import DistContext
from nasbench.supernet import checkpoint
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill

CONFIG = DistillConfig(
    ridge_tokens=512, align_tokens=768, supernet_tokens=768, align_batch_tokens=128, supernet_batch_tokens=128,
    hidden_weight=0.5, log_every=2, checkpoint_every_s=0.0,
)  # fmt: skip


def test_two_processes_are_one_and_a_run_goes_on_with_another_number(make_run):
    alone, two, stopped = make_run("alone"), make_run("two"), make_run("stopped")
    distill(alone, CONFIG, dtype=torch.float32)
    together(two, CONFIG)
    assert_same(two, alone)
    # Stopped in one process only, both end after the same step, with a checkpoint.
    assert together(stopped, CONFIG, stop_at=3) == ["stopped 0\n", "stopped 1\n"]
    state = checkpoint.latest(stopped.supernet).state
    assert (state["stage"], state["step"]) == ("supernet", 4)
    distill(stopped, CONFIG, dtype=torch.float32)
    assert_same(stopped, alone)


def test_rows_are_shared_out_evenly():
    batch = Batch(torch.arange(12).view(6, 2), torch.arange(12).view(6, 2))
    parts = [DistContext(rank, 3).local_rows(batch) for rank in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in parts]).sort(0).values, batch.tokens)
    assert torch.equal(parts[1].tokens, parts[1].ages)
    with pytest.raises(UserError, match="multiple of 4"):
        DistContext(0, 4).local_rows(batch)
