"""Two processes over gloo train what one does, and a run goes on with another number of them."""

import csv
import os
import socket
import subprocess
import sys

import pytest
import torch
from tolerances import relative_rmse

from nasbench.errors import UserError
from nasbench.supernet import checkpoint
from nasbench.supernet.data import Batch
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill
from nasbench.supernet.workers import Workers

CONFIG = DistillConfig(
    ridge_tokens=512, align_tokens=768, supernet_tokens=768, align_batch_tokens=128, supernet_batch_tokens=128,
    hidden_weight=0.5, log_every=2, checkpoint_every_s=0.0,
)  # fmt: skip
SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from nasbench.runs import Run
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill
from nasbench.supernet.workers import workers_of
torch.set_num_threads(1)
path, stop_at = sys.argv[1], int(sys.argv[2])
count = 0
def progress(stage, done, total):
    global count
    count += stage == "supernet"
    if count == stop_at:
        os.kill(os.getpid(), signal.SIGINT)
with workers_of("cpu") as (workers, device):
    try:
        distill(Run.open(Path(path)), {config!r}, dtype=torch.float32, workers=workers, progress=progress)
    except KeyboardInterrupt:
        print("stopped", workers.rank)
"""


def together(run, size=2, stop_at=-1, config=CONFIG):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", SCRIPT.format(config=config), str(run.path), str(stop_at)]
    workers = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(size)
    ]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, said
    return [out for out, _ in said]


def losses(run):
    with (run.supernet / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(row["stage"], row["step"], row["layer"]) for row in rows], [float(row["loss"]) for row in rows]


def weights(run):
    return checkpoint.latest(run.supernet).weights()


def assert_same(run, other):
    (keys, values), (expected_keys, expected) = losses(run), losses(other)
    assert keys == expected_keys
    assert values == pytest.approx(expected, rel=1e-4)
    for name, tensor in weights(run).items():
        assert relative_rmse(tensor, weights(other)[name]) < 1e-3, name


def test_two_processes_are_one_and_a_run_goes_on_with_another_number(make_run):
    alone, two, stopped = make_run("alone"), make_run("two"), make_run("stopped")
    distill(alone, CONFIG, dtype=torch.float32)
    together(two)
    assert_same(two, alone)
    # Stopped in one process only, both end after the same step, with a checkpoint.
    assert together(stopped, stop_at=3) == ["stopped 0\n", "stopped 1\n"]
    state = checkpoint.latest(stopped.supernet).state
    assert (state["stage"], state["step"]) == ("supernet", 4)
    distill(stopped, CONFIG, dtype=torch.float32)
    assert_same(stopped, alone)


def test_rows_are_shared_out_evenly():
    batch = Batch(torch.arange(12).view(6, 2), torch.arange(12).view(6, 2))
    parts = [Workers(rank, 3).share(batch) for rank in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in parts]).sort(0).values, batch.tokens)
    assert torch.equal(parts[1].tokens, parts[1].ages)
    with pytest.raises(UserError, match="multiple of 4"):
        Workers(0, 4).share(batch)
