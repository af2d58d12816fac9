"""On two CUDA GPUs over NCCL: weights that both hold and weights that they share out train what one GPU does."""

import pytest
import torch
from supernet_workers import losses, said, start

from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
TRAINING = """
with dist_context("cuda") as (workers, device):
    distill(run, {config!r}, dtype=torch.float32, device=device, workers=workers)
    print(torch.distributed.get_backend(), device)
"""


def test_two_gpus_are_one(make_run):
    config = DistillConfig(
        ridge_tokens=512, align_tokens=1024, supernet_tokens=1024, align_batch_tokens=128, supernet_batch_tokens=128,
        frozen=(), sandwich=True, log_every=2,
    )  # fmt: skip
    alone = make_run("alone")
    distill(alone, config, device="cuda", dtype=torch.float32)
    keys, expected = losses(alone)
    for name, shard in (("whole", False), ("shared", True)):
        run = make_run(name)
        out = said(start(TRAINING.format(config=config.updated({"shard": shard})), run.path))
        assert sorted(text.split() for text in out) == [["nccl", "cuda:0"], ["nccl", "cuda:1"]]
        found, values = losses(run)
        assert found == keys
        assert values == pytest.approx(expected, rel=1e-2)
