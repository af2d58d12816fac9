"""On two CUDA GPUs over NCCL: weights that both hold and weights that they share out train what one GPU does."""

import shutil

import pytest
import torch
from supernet_workers import losses, said, start

from nasbench.cli.main import run as command
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


def test_a_second_gpu_scores_what_the_first_does(make_run, capsys):
    run = make_run("scored")
    config = DistillConfig(ridge_tokens=512, align_tokens=256, supernet_tokens=256, align_batch_tokens=128)
    distill(run, config, device="cuda", dtype=torch.float32)
    scores = []
    for device in ("cuda:0", "cuda:1"):
        assert command(["eval", str(run.path), "--placement", "AJJA", "--tasks", "loss,kl", "--device", device]) == 0
        assert torch.cuda.current_device() == int(device[-1])
        scores.append(capsys.readouterr().out)
        shutil.rmtree(run.path / "scores", ignore_errors=True)
    torch.cuda.set_device(0)
    assert scores[0] == scores[1]
