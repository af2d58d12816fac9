"""Compiles what the kernels' wrappers would launch on other cards, without a GPU: run as a script, one JSON line each.

The wrappers are called on tensors without memory, and a launch is recorded instead of run: what is compiled has the
block sizes, warps and stages that the wrapper chooses, not those of a list that goes stale.

    python compile_launches.py 80 90
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from nasbench_kernels.dynamic_conv.kernel import triton_short_conv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

BF16, FP32 = torch.bfloat16, torch.float32
TYPES = {BF16: "*bf16", FP32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "num_ctas", "maxnreg")


def nothing(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def convolutions(channels: int) -> None:
    x = nothing(2, 2048, channels).requires_grad_()
    for shape in ((2, 2048, channels, 4), (channels, 4)):
        y = triton_short_conv(x, nothing(*shape), age=nothing(2, 2048, dtype=torch.int32))
        y.backward(nothing(*y.shape))
    triton_short_conv(x.detach(), nothing(2, 2048, channels, 4), nothing(2, 3, channels))


CASES: dict[str, Callable[[], None]] = {
    "convolutions": lambda: convolutions(3072),
    "convolutions of an odd width": lambda: convolutions(4 * 171),
}


def recorded(case: Callable[[], None]) -> dict[str, tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """What a case launches, each distinct launch once: kernel, arguments by name, options."""
    launches: dict[str, tuple[JITFunction, dict[str, Any], dict[str, Any]]] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        bound = dict(zip(self.arg_names, args, strict=False)) | keywords
        shown = {name: str(value.dtype) if torch.is_tensor(value) else value for name, value in bound.items()}
        launches[f"{self.fn.__name__} {shown} {options}"] = (self, bound, options)

    original = JITFunction.run
    JITFunction.run = run
    try:
        case()
    finally:
        JITFunction.run = original
    return launches


def source_of(kernel: JITFunction, bound: dict[str, Any]) -> ASTSource:
    """As triton specialises a launch: ones are constants, sizes divisible by 16 and pointers are said to be so."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if torch.is_tensor(value):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
        if torch.is_tensor(value) or (type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def registers(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread: a kernel that spills has a stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout + text.stderr)
    assert used, text
    return int(used[1]), int(used[2])


def main(architectures: list[int], cases: dict[str, Callable[[], None]]) -> None:
    for arch in architectures:
        for name, case in cases.items():
            for kernel, bound, options in recorded(case).values():
                compiled = triton.compile(source_of(kernel, bound), target=GPUTarget("cuda", arch, 32), options=options)
                count, stack = registers(compiled.asm["cubin"])
                row = {"arch": arch, "case": name, "kernel": kernel.fn.__name__, "warps": compiled.metadata.num_warps}
                row |= {"shared": compiled.metadata.shared, "registers": count, "stack": stack}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]], CASES)
