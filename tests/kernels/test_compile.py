"""Every kernel compiles for every card, within its registers and shared memory, as its wrapper launches it there."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

# Not imported here: other tests must still be able to choose the interpreter, which triton's first import settles.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
SCRIPT = Path(__file__).with_name("compile_launches.py")
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Shared memory that one block may use (CUDA C++ Programming Guide)."""
MOST_REGISTERS = 255
SMALL_STACK = 16
"""Bytes of stack that are no spill: ptxas now and then keeps a scalar or two there."""
LARGER_STACK = {
    "bwd_qk_kernel": 432, "bwd_kv_kernel": 392, "fwd_prepare_kernel": 248, "fwd_state_kernel": 216,
    "bwd_state_kernel": 80, "mamba2_scan_kernel": 112, "mamba2_collect_kernel": 304,
}  # fmt: skip
"""Of kernels that hold a chunk's tiles in four warps. Two such blocks to a multiprocessor took half to three quarters
of the time of one with eight warps and half the spills on an H100; what spills is what to mend about them next."""


def compiled(*arguments):
    """One row per kernel. Another process: under the interpreter, kernels are no longer what triton can compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(arch, rows):
    assert {row["arch"] for row in rows} == {arch}
    for row in rows:
        assert row["shared"] <= SHARED_BYTES[arch], row
        assert row["registers"] <= MOST_REGISTERS, row
        # Why not: nasbench_kernels/gated_delta/prefill.py. Of the products every tile was checked on an H100.
        assert not row["wgmma"] or row["kernel"].endswith("gemm_kernel"), row
        # A launch that may begin early waits; on cards that cannot, and in other kernels, nothing of it is left.
        assert row["waits"] == row["overlap"] == (row["step"] and arch >= 90), row
        assert row["stack"] <= LARGER_STACK.get(row["kernel"], SMALL_STACK), row


# The smallest and the largest card here; all of them, with every shape, take minutes.
@pytest.mark.parametrize("arch", [86, 90])
def test_the_2b_models_launches(arch):
    rows = compiled(arch)
    check(arch, rows)
    # A new kernel needs a case in compile_launches.py.
    assert {row["kernel"] for row in rows} == defined_kernels()


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_launches_of_other_shapes(arch):
    check(arch, compiled(arch, "--all"))


def defined_kernels():
    root = Path(__file__).parents[2] / "kernels" / "nasbench_kernels"
    defined = set()
    for path in root.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        defined |= {
            line.split("(")[0].removeprefix("def ")
            for decorator, line in pairwise(lines)
            if decorator == "@triton.jit" and line.split("(")[0].endswith("_kernel")
        }
    return defined
