"""Trainings by several processes over gloo, started as torchrun would, and whether two of them went the same way."""

import csv
import os
import socket
import subprocess
import sys

import pytest
from tolerances import relative_rmse

from nasbench.supernet import checkpoint

HEADER = """
import os, signal, sys, torch
from pathlib import Path
from nasbench.checkpoints import hf_folder
from nasbench.runs import Run
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill
from nasbench.parallel.context import dist_context
torch.set_num_threads(1)
run = Run.open(Path(sys.argv[1]))
"""
TRAINING = """
stop_at = int(sys.argv[2])
count = 0
def progress(stage, done, total):
    global count
    count += stage == "supernet"
    if count == stop_at:
        os.kill(os.getpid(), {signal})
with dist_context("cpu") as (workers, device):
    if workers.rank:
        hf_folder.read_tensors = None  # the first process reads for all
    try:
        distill(run, {config!r}, dtype=torch.float32, workers=workers, progress=progress)
    except KeyboardInterrupt:
        print("stopped", workers.rank)
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(script, *arguments, size=2):
    """The processes of a script; HEADER comes before it, the run's folder is its first argument."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **meeting, "WORLD_SIZE": str(size)}
    command = [sys.executable, "-c", HEADER + script, *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]


def said(workers):
    """What processes that end well say, each."""
    out = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), out
    return [text for text, _ in out]


def together(run, config, size=2, stop_at=-1):
    """Distils a run; the first process gets a Ctrl-C in step `stop_at` of the supernet stage."""
    script = TRAINING.format(config=config, signal="signal.SIGINT")
    return said(start(script, run.path, stop_at, size=size))


def losses(run):
    with (run.supernet / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(row["stage"], row["step"], row["layer"]) for row in rows], [float(row["loss"]) for row in rows]


def assert_same(run, other):
    (keys, values), (expected_keys, expected) = losses(run), losses(other)
    assert keys == expected_keys
    assert values == pytest.approx(expected, rel=1e-6)
    expected = checkpoint.latest(other.supernet).weights()
    for name, tensor in checkpoint.latest(run.supernet).weights().items():
        assert relative_rmse(tensor, expected[name]) < 1e-3, name
