"""Processes as torchrun starts them, on one machine and on two: what they train, and how they end."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from supernet_workers import assert_same, free_port, start

from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill

FAILING = """
from nasbench.core.errors import MachineError
with dist_context("cpu") as (workers, device):
    if workers.rank == {failing}:
        raise {error}
    workers.wait(torch.device(device))  # for a process that never comes
"""


@pytest.mark.parametrize(
    ("failing", "error", "told"),
    [
        (1, "MachineError('no room on /disk')", "no room on /disk"),
        (0, "ValueError('bad sum')", "ValueError: bad sum"),
    ],
)
def test_one_that_fails_ends_all_and_says_why_in_a_line(make_run, failing, error, told):
    workers = start(FAILING.format(failing=failing, error=error), make_run().path)
    said = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [1, 1]
    assert said[1 - failing] == ("", "")
    assert said[failing] == ("", f"nasbench: process {failing} of 2 on {socket.gethostname()}: {told}\n")


def torchrun(run, machines, *options):
    """`nasbench distill` on so many machines of one process each, which meet over the loopback."""
    port = free_port()
    words = "--align-batch 128 --supernet-batch 128 --align-tokens 768 --supernet-tokens 768 --dtype fp32 --device cpu"
    settings = ("hidden_weight=0.5", "log_every=2", "ridge_tokens=512")
    command = ["-m", "nasbench", "distill", "--out", str(run.path), *words.split(), *options]
    command += [f"--set={setting}" for setting in settings]
    group = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "1",
        "--nnodes",
        str(machines),
        "--rdzv-backend",
        "c10d",
    ]
    group += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    groups = [
        subprocess.Popen(
            [sys.executable, *group, "--node-rank", str(number), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(machines)
    ]  # fmt: skip
    return [(group.communicate(timeout=240), group.returncode) for group in groups]


@pytest.mark.slow
def test_two_machines_train_what_one_process_does(make_run):
    config = DistillConfig(
        ridge_tokens=512, align_tokens=768, supernet_tokens=768, align_batch_tokens=128, supernet_batch_tokens=128,
        hidden_weight=0.5, log_every=2,
    )  # fmt: skip
    alone = make_run("alone")
    distill(alone, config, dtype=torch.float32)
    for name, options in (("whole", ()), ("shared", ("--shard",))):
        run = make_run(name)
        ended = torchrun(run, 2, *options)
        assert [code for _, code in ended] == [0, 0], ended
        assert_same(run, alone)


@pytest.mark.slow
def test_under_torchrun_a_bad_input_is_one_line(make_run):
    """Rows that do not divide, which both find out; torchrun's own report follows."""
    ended = torchrun(make_run(), 2, "--align-batch", "32")
    assert [code for _, code in ended] == [1, 1]
    lines = [line for (_, said), _ in ended for line in said.splitlines() if line.startswith("nasbench:")]
    assert len(lines) == 1, lines
    assert "of 2 on" in lines[0]
    assert "does not divide over 2 processes" in lines[0]
