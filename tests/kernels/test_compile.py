"""The convolutions' kernels compile for every card, within its registers and shared memory, as they are launched."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Not imported here: other tests must still be able to choose the interpreter, which triton's first import settles.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
SCRIPT = Path(__file__).with_name("compile_launches.py")
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Shared memory that one block may use (REFERENCES, section 6; CUDA C++ Programming Guide)."""
MOST_REGISTERS = 255
SMALL_STACK = 16
"""Bytes of stack that are no spill: ptxas now and then keeps a scalar or two there."""


def compiled(*arguments):
    """One row per kernel. Another process: under the interpreter, kernels are no longer what triton can compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_convolutions_fit(arch):
    rows = compiled(arch)
    kernels = {"conv_forward_kernel", "conv_backward_taps_kernel", "conv_backward_input_kernel"}
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert row["shared"] <= SHARED_BYTES[arch], row
        assert row["registers"] <= MOST_REGISTERS, row
        assert row["stack"] <= SMALL_STACK, row
