"""Compiles what the kernels' wrappers would launch on other cards, without a GPU: run as a script, one JSON line each.

The wrappers are called on tensors without memory, and a launch is recorded instead of run: what is compiled has the
block sizes, warps and stages that the wrapper chooses for the card, not those of a list that goes stale.

    python compile_launches.py 80 90
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from nasbench_kernels import ops
from nasbench_kernels.common import pdl
from nasbench_kernels.gated_delta import RowLayout
from nasbench_kernels.gated_delta.decode import StepLaunch
from nasbench_kernels.linear import launch as choices
from nasbench_kernels.linear.gemm import run_gemm
from nasbench_kernels.mamba2.decode import StepLaunch as Mamba2Launch
from nasbench_kernels.mamba2.decode import fused_mamba2_step
from nasbench_kernels.mamba2.prefill import triton_mamba2
from nasbench_kernels.mla import decode as mla
from nasbench_kernels.rwkv7 import decode as rwkv7
from nasbench_kernels.rwkv7 import prefill as prompts
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

BF16, FP32 = torch.bfloat16, torch.float32
TYPES = {BF16: "*bf16", FP32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64"}
SWITCH = "DISABLE_MMA_V3"
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Card:
    """Multiprocessors, and shared memory of each in bytes, by the architecture's data sheet."""

    sms: int
    shared: int


CARDS = {
    80: Card(108, 164 << 10),
    86: Card(82, 100 << 10),
    87: Card(16, 164 << 10),
    89: Card(128, 100 << 10),
    90: Card(132, 228 << 10),
}


def nothing(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def recurrent(
    batch: int, heads: int, key_dim: int, value_dim: int, state: torch.dtype, launch: StepLaunch | None = None
) -> None:
    keys, values = heads * key_dim, heads * value_dim
    at = (0, keys, 2 * keys, 2 * keys + values, 2 * keys + 2 * values, 2 * keys + 2 * values + heads)
    ops.recurrent_step(
        nothing(batch, at[-1] + heads),
        RowLayout(*at),
        nothing(batch, heads, key_dim, value_dim, dtype=state),
        nothing(heads, dtype=FP32),
        nothing(heads, dtype=FP32),
        nothing(value_dim),
        ops.StepWorkspace(),
        nothing(batch, values, 4),
        nothing(batch, 3, values),
        launch=launch,
    )


def other_recurrences(batch: int, heads: int, dim: int) -> None:
    """Steps of D, K, L and T, with keys and values of `dim`."""
    size, fp32 = heads * dim, partial(nothing, dtype=FP32)
    row, state, channels = nothing(batch, 4 * size + 64), fp32(batch, heads, dim, dim), nothing(batch, size)
    step = partial(ops.recurrent_step, row, RowLayout(0, size, 2 * size, 3 * size, 0, 4 * size), state, fp32(heads))
    once = fp32(heads), nothing(dim), ops.StepWorkspace()
    each = fp32(size), nothing(dim), ops.StepWorkspace()
    convolution = nothing(3 * size, 4), nothing(batch, 3, 3 * size)
    step(*once, *convolution)
    step(*once, *convolution, form=ops.StepForm(sign=0.0, gate=""))
    wide = ops.grouped_gemm(row[:, :dim], dim, nothing(2 * size, dim), (size, size), nothing(size))
    step(*each, *convolution, form=ops.StepForm(gate="sigmoid"), decay=wide[:, :size], gate=channels)
    narrow = nothing(size, 16), nothing(size)
    step(*each, form=ops.StepForm(False, False, -1.0), decay=nothing(batch, 16), decay_product=narrow)
    step(*once, form=ops.StepForm(False, False, 0.0), tables=(fp32(batch, dim), fp32(batch, dim)))


def attention(batch: int, heads: int, kv_heads: int, slots: int, dim: int, dtype: torch.dtype, norm: bool) -> None:
    keys = nothing(batch, kv_heads, slots, dim, dtype=dtype)
    positions, weight = nothing(batch, dtype=torch.int64), nothing(dim, dtype=dtype) if norm else None
    table = nothing(batch, dim, dtype=FP32)
    row = nothing(batch, (heads + 2 * kv_heads) * dim, dtype=dtype)
    q = ops.rotary_write(row, positions, table, table, keys, keys, heads, weight, weight)
    ops.decode_attention(q, keys, keys, positions, slots)


def between_products(batch: int, hidden: int, inner: int) -> None:
    x = nothing(batch, hidden)
    ops.add_norm(x, x, nothing(hidden), 1e-6)
    ops.swiglu(nothing(batch, 2 * inner))
    ops.silu_part(nothing(batch, 2 * hidden), hidden, 384)
    ops.conv_step(nothing(batch, 3 * hidden), nothing(2 * hidden, 4), nothing(batch, 3, 2 * hidden))


def skinny_products(batch: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    x = nothing(batch, hidden, dtype=dtype)
    for sequences in {16, batch}:
        ops.swiglu_gemm(nothing(sequences, hidden, dtype=dtype), nothing(2 * inner, hidden, dtype=dtype))
    ops.gemm(x, nothing(inner - 8, hidden, dtype=dtype), nothing(inner - 8, dtype=dtype))
    swap_ab_products(batch, hidden, inner, dtype)
    inner_row = nothing(batch, inner, dtype=dtype)
    parts = ops.gemm(inner_row, nothing(hidden, inner, dtype=dtype), split_k=True)
    ops.add_norm(x, parts, nothing(hidden, dtype=dtype), 1e-6)
    ops.argmax(nothing(batch, 151936, dtype=dtype))


def swap_ab_products(batch: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    x, weight = nothing(batch, hidden, dtype=dtype), nothing(2 * inner, hidden, dtype=dtype)
    launch = partial(choices.swap_ab_launch, batch, inner, dtype.itemsize, *choices.sm_limits(x.device))
    run_gemm(x, weight, None, launch(swiglu=True), swiglu=True)
    run_gemm(x, weight[:inner], nothing(inner, dtype=dtype), launch())


def products(hidden: int, inner: int, vocabulary: int) -> None:
    x, norm = nothing(1, hidden), {"before": "norm", "norm_weight": nothing(hidden), "eps": 1e-6}
    ops.gemv(x, nothing(2 * inner, hidden), swiglu=True, **norm)
    ops.gemv(nothing(1, inner), nothing(hidden, inner), add_to=x)
    ops.gemv(x, nothing(vocabulary, hidden), **norm)
    ops.gemv(x, nothing(2048, hidden), nothing(2048), **norm)
    ops.gemv(nothing(1, 384), nothing(12288, 384), nothing(12288), before="silu")


def convolutions(channels: int) -> None:
    x = nothing(2, 2048, channels).requires_grad_()
    for shape in ((2, 2048, channels, 4), (channels, 4)):
        y = ops.triton_short_conv(x, nothing(*shape), position_ids=nothing(2, 2048, dtype=torch.int32))
        y.backward(nothing(*y.shape))
    ops.triton_short_conv(x.detach(), nothing(2, 2048, channels, 4), nothing(2, 3, channels))


def rule(heads: int, key_dim: int, value_dim: int, train: bool) -> None:
    keys = (2, 2048, heads, key_dim)
    q, k, v = (nothing(*size).requires_grad_(train) for size in (keys, keys, (2, 2048, heads, value_dim)))
    gates = nothing(2, 2048, heads, dtype=FP32).requires_grad_(train)
    out, state = ops.triton_gated_delta(q, k, v, gates, gates)
    if train:
        (out.sum() + state.sum()).backward()


def around_the_rule(heads: int, key_dim: int, value_dim: int) -> None:
    keys, values = heads * key_dim, heads * value_dim
    at = (0, keys, 2 * keys, 2 * keys + values, 2 * keys + 2 * values, 2 * keys + 2 * values + heads)
    row, gates = nothing(2, 2048, at[-1] + heads), nothing(heads, dtype=FP32)
    for mixed in (None, nothing(2, 2048, 2 * keys + values)):
        ops.recurrence_inputs(row, RowLayout(*at), key_dim, gates, gates, mixed)
    ops.gated_norm(nothing(2, 2048, heads, value_dim), row[..., at[3] : at[4]], nothing(value_dim))
    ops.triton_short_conv(row[..., at[2] : at[3]], nothing(2, 2048, values, 4), nothing(2, 3, values))


def distillation(tokens: int, inner: int, heads: int, kv_heads: int, dim: int, vocabulary: int) -> None:
    logits = nothing(tokens, vocabulary)
    ops.divergence_rows(logits, logits)
    ops.divergence_rows(logits, logits, gradient=True)
    inner_row = nothing(2, tokens, 2 * inner).requires_grad_()
    ops.swiglu(inner_row).backward(nothing(2, tokens, inner))
    table = nothing(tokens, dim, dtype=FP32)
    row = nothing(2, tokens, (heads + 2 * kv_heads) * dim).requires_grad_()
    q, k, v = ops.rotary(row, table, table, heads, kv_heads)
    (q.sum() + k.sum() + v.sum()).backward()
    row = nothing(2, tokens, 4 * heads * dim + 72 + 2 * heads).requires_grad_()
    gates = nothing(heads, dtype=FP32).requires_grad_()
    sizes = (heads * dim, heads * dim, 72)
    q, k, g, beta, v, gate, further = ops.training_inputs(row, gates, gates, heads, dim, sizes)
    out = ops.gated_norm(v.unflatten(-1, (heads, dim)), gate, nothing(dim).requires_grad_())
    (q.sum() + k.sum() + g.sum() + beta.sum() + further.sum() + out.sum()).backward()


def mamba2_step(
    batch: int, heads: int, dim: int, size: int, state: torch.dtype, launch: Mamba2Launch | None = None
) -> None:
    inner, gates = heads * dim, [nothing(heads, dtype=FP32) for _ in range(3)]
    channels = inner + 2 * size
    fused_mamba2_step(
        nothing(batch, inner + channels + heads), nothing(channels, 4), nothing(channels), nothing(batch, 3, channels),
        nothing(batch, heads, dim, size, dtype=state), *gates, nothing(inner), eps=1e-5, launch=launch,
    )  # fmt: skip


def mamba2_prompt(heads: int, dim: int, size: int, dtype: torch.dtype, train: bool = False) -> None:
    x, b, c = (nothing(2, 2048, *rest, dtype=dtype) for rest in ((heads, dim), (1, size), (1, size)))
    gates = nothing(2, 2048, heads, dtype=FP32).requires_grad_(train)
    out, state = triton_mamba2(x, gates, gates, b, c, nothing(heads, dtype=FP32))
    if train:
        (out.sum() + state.sum()).backward()


def rwkv7_step(batch: int, hidden: int, heads: int, dim: int, ranks: tuple[int, int, int], state: torch.dtype) -> None:
    x, inner = nothing(batch, hidden), heads * dim
    mixed = rwkv7.token_mix(x, x, nothing(6, hidden), 6)
    sizes = (inner, inner, inner, *ranks)
    projected = ops.grouped_gemm(mixed[0], mixed.stride(0), nothing(sum(sizes), hidden), sizes)
    ups = tuple(nothing(inner, rank) for rank in ranks)
    raw = rwkv7.low_ranks(projected[:, 3 * inner :], ups, (nothing(inner), nothing(inner)))
    weights, kept = [nothing(inner) for _ in range(5)], nothing(batch, heads, dim, dim, dtype=state)
    rwkv7.rwkv7_fused_step(projected, raw, kept, *weights[:3], (weights[3], weights[4]), strongest=0.6, eps=1e-3)


def rwkv7_prompt(heads: int, dim: int) -> None:
    x = nothing(2, 2048, heads, dim)
    row, weight = x.flatten(2), nothing(heads * dim)
    prompts.token_mixes(row, row[:, 0], nothing(6, heads * dim))
    prompts.recurrence_inputs(x, row, row, weight, weight, 0.6)
    prompts.gated_output(x, x, x, x, row, weight, (weight, weight), 1e-3)


def latent_step(batch: int, heads: int, slots: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    latent, rope, nope = sizes
    latents, positions = nothing(batch, slots, latent + rope, dtype=dtype), nothing(batch, dtype=torch.int64)
    table, row = nothing(batch, rope, dtype=FP32), nothing(batch, heads * (nope + rope) + latent + rope, dtype=dtype)
    norm = nothing(latent, dtype=dtype)
    q_rope = mla.latent_write(row, positions, table, table, norm, latents, heads, nope, eps=1e-6)
    mla.latent_attention(nothing(heads, batch, latent, dtype=dtype), q_rope, latents, positions, slots, 0.07)


CASES: dict[str, Callable[[], None]] = {
    "latent attention of DeepSeek-V2-Lite": lambda: latent_step(64, 16, 65536, (512, 64, 128), BF16),
    "latent attention of DeepSeek-V2-Lite, batch 256": lambda: latent_step(256, 16, 65536, (512, 64, 128), BF16),
    "latent attention smollm2": lambda: latent_step(8, 9, 8192, (192, 32, 64), BF16),
    "rwkv7 step 1.5B": lambda: rwkv7_step(256, 2048, 32, 64, (96, 96, 256), FP32),
    "rwkv7 step 1.5B, bf16 state, batch 1": lambda: rwkv7_step(1, 2048, 32, 64, (96, 96, 256), BF16),
    "rwkv7 prompt 1.5B": lambda: rwkv7_prompt(32, 64),
    "mamba2 step 2.7B": lambda: mamba2_step(64, 80, 64, 128, FP32),
    "mamba2 step 2.7B, bf16 state, batch 1": lambda: mamba2_step(1, 80, 64, 128, BF16),
    "mamba2 step 2.7B, one head a program": lambda: mamba2_step(64, 80, 64, 128, FP32, Mamba2Launch(64)),
    "mamba2 prompt 2.7B": lambda: mamba2_prompt(80, 64, 128, BF16),
    "mamba2 prompt 2.7B, training": lambda: mamba2_prompt(80, 64, 128, BF16, True),
    "recurrent 2B batch 128": lambda: recurrent(128, 12, 96, 256, FP32),
    "recurrent 2B batch 1": lambda: recurrent(1, 12, 96, 256, FP32),
    "recurrent 2B bf16 state": lambda: recurrent(128, 12, 96, 256, BF16),
    "steps of D, K, L and T": lambda: other_recurrences(256, 12, 128),
    "steps of D, K, L and T, smollm2": lambda: other_recurrences(64, 9, 64),
    "attention 2B": lambda: attention(128, 12, 2, 65536, 128, BF16, False),
    "between products": lambda: between_products(128, 1536, 8960),
    "products of 128 sequences": lambda: skinny_products(128, 1536, 8960, BF16),
    "products": lambda: products(1536, 8960, 151936),
    "convolutions": lambda: convolutions(3072),
    "gated delta rule 2B": lambda: rule(12, 96, 256, False),
    "gated delta rule 2B, training": lambda: rule(12, 96, 256, True),
    "around the rule 2B": lambda: around_the_rule(12, 96, 256),
    "distillation smollm2": lambda: distillation(2048, 1536, 9, 3, 64, 49152),
}
for tried in (
    StepLaunch(64, 1, 4, 4, 1),
    StepLaunch(32, 1, 8, 1, 1),
):
    CASES[f"recurrent 2B as {tried}"] = partial(recurrent, 128, 12, 96, 256, FP32, tried)
MORE: dict[str, Callable[[], None]] = {
    "attention qwen3": lambda: attention(18, 16, 8, 65536, 128, BF16, True),
    "attention smollm2": lambda: attention(1, 9, 3, 8192, 64, BF16, False),
    "attention 96": lambda: attention(1, 32, 32, 4096, 96, torch.float16, False),
    "attention fp32": lambda: attention(4, 12, 2, 4096, 128, FP32, False),
    "between products, 4B": lambda: between_products(64, 2048, 11008),
    "products of 64 sequences, 4B": lambda: skinny_products(64, 2048, 11008, BF16),
    "products of 16 sequences": lambda: skinny_products(16, 576, 1536, BF16),
    "products, 4B": lambda: products(2048, 11008, 151936),
}
MORE |= {
    "mamba2 step smollm2": lambda: mamba2_step(128, 9, 64, 64, FP32),
    "mamba2 step of wide heads": lambda: mamba2_step(64, 12, 256, 256, BF16),
    "mamba2 prompt smollm2": lambda: mamba2_prompt(9, 64, 64, torch.float16),
    "mamba2 prompt smollm2, training": lambda: mamba2_prompt(9, 64, 64, BF16, True),
    "mamba2 prompt of wide heads": lambda: mamba2_prompt(4, 256, 256, BF16),
    "distillation 2B": lambda: distillation(2048, 8960, 12, 2, 128, 151936),
    "gated delta rule smollm2, training": lambda: rule(9, 64, 64, True),
    "gated delta rule of wide keys": lambda: rule(4, 256, 288, False),
    "gated delta rule of 128 keys, training": lambda: rule(16, 128, 256, True),
}
HEADS = (
    *((4, 256, 288), (4, 192, 384), (4, 128, 576), (8, 256, 144), (8, 192, 192), (8, 128, 288)),
    *((12, 128, 192), (12, 64, 384), (16, 128, 256), (9, 64, 171)),
)
"""Heads, key and value dimensions of the hardware-aware search, the 4B model, and one odd size."""
for shape in HEADS:
    for sequences in (1, 256):
        MORE[f"recurrent {shape} batch {sequences}"] = partial(recurrent, sequences, *shape, FP32)


def recorded(case: Callable[[], None]) -> dict[str, tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """What a case launches, each distinct launch once: kernel, arguments by name, options."""
    launches: dict[str, tuple[JITFunction, dict[str, Any], dict[str, Any]]] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        bound = dict(zip(self.arg_names, args, strict=False)) | keywords
        shown = {name: str(value.dtype) if torch.is_tensor(value) else value for name, value in bound.items()}
        options[SWITCH] = os.environ.get(SWITCH)
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


def pretend(arch: int) -> None:
    """Makes the wrappers choose for a card of this architecture."""
    card = CARDS[arch]
    for name, module in sys.modules.items():
        if name.startswith("nasbench_kernels.") and hasattr(module, "sm_limits"):
            module.sm_limits = lambda device: (card.sms, card.shared)
    pdl.capability = lambda device: arch // 10


def main(architectures: list[int], cases: dict[str, Callable[[], None]]) -> None:
    for arch in architectures:
        pretend(arch)
        for name, case in cases.items():
            for kernel, bound, options in recorded(case).values():
                switch = options.pop(SWITCH)
                os.environ |= {} if switch is None else {SWITCH: switch}
                compiled = triton.compile(source_of(kernel, bound), target=GPUTarget("cuda", arch, 32), options=options)
                os.environ.pop(SWITCH, None)
                count, stack = registers(compiled.asm["cubin"])
                row = {"arch": arch, "case": name, "kernel": kernel.fn.__name__, "warps": compiled.metadata.num_warps}
                row |= {"shared": compiled.metadata.shared, "registers": count, "stack": stack}
                row["wgmma"] = "wgmma" in compiled.asm["ptx"]
                row["step"] = "PDL" in kernel.arg_names
                row["waits"] = options.get("launch_pdl", False) and "griddepcontrol.wait" in compiled.asm["ptx"]
                row["overlap"] = "griddepcontrol" in compiled.asm["ptx"]
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    chosen = CASES | MORE if "--all" in sys.argv else CASES
    main([int(word) for word in sys.argv[1:] if word.isdigit()], chosen)
