"""Decode speed of whole models on this GPU, beside the roofline that the same run measures.

    python benchmarks/decode.py [--out FILE.json] [--seconds 1] [CASE ...]

A case is MODEL:CONTEXT:BATCH, as jet-nemotron-2b:64k:128; the default cases are the published table. Before the first
speed of a shape, one layer of each of its kinds is compared with plain PyTorch in fp32. If they differ, the shape is
not measured and the exit code is 1. Weights are random, and the cache is filled with random data to the context.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import need_gpu, parser_of, relative_rmse, run, worst, write_json
from nasbench.checkpoints.load import random_decoder
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import MachineError, UserError
from nasbench.core.sizes import format_size, parse_size
from nasbench.model.shapes import ModelSpec
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import measure_ceilings
from nasbench.runtime.throughput import measure

CASES = (
    "jet-nemotron-2b:64k:128",
    "jet-nemotron-2b:256k:max",
    "jet-nemotron-2b:4k:1024",
    "jet-nemotron-2b:4k:1",
    "jet-nemotron-2b:64k:1",
    "jet-nemotron-4b:64k:64",
    "qwen3-1.7b:64k:max",
    "qwen3-1.7b:4k:128",
)
CLOSE = 2e-2
"""Relative RMSE allowed for bf16 logits; the reference runs on the same rounded weights in fp32 on the CPU."""


@torch.inference_mode()
def step_error(shape: ModelSpec) -> float:
    """Relative RMSE of a decode step's logits in bf16 against the plain form's in fp32, after a short prompt.

    The shape with one layer of every kind it is made of, at batch 1 and 3.
    """
    names = tuple(dict.fromkeys(shape.placement))
    small = ModelSpec(**{**vars(shape), "num_layers": len(names), "published_placement": ""})
    gpu = random_decoder(small, names, dtype=torch.bfloat16, device="cuda", seed=1)
    cpu = random_decoder(small, names, dtype=torch.float32, device="cpu", seed=1)
    cpu.load_state_dict(gpu.state_dict())
    errors = []
    for batch in (1, 3):
        text = torch.randint(small.vocab_size, (batch, 42))
        cache = gpu.new_cache(batch, 64)
        gpu(text[:, :40].cuda(), cache)
        gpu.prepare(64)
        for t in (40, 41):
            ours = gpu.step_at(text[:, t].cuda(), torch.full((batch,), t, device="cuda"), cache).float().cpu()
        errors.append(relative_rmse(ours, cpu(text)[:, -1]))
    torch.cuda.empty_cache()
    return worst(errors)


def measure_all(options: argparse.Namespace) -> int:
    cases = [parse_case(text) for text in options.cases]
    need_gpu()
    ceilings = measure_ceilings("cuda", free_bytes("cuda"), torch.bfloat16)
    print(
        f"{torch.cuda.get_device_name()}: read {ceilings.read_gb_s:.0f} GB/s, in place {ceilings.in_place_gb_s:.0f}, "
        f"products {ceilings.matmul_tflop_s:.0f} TFLOP/s, torch {torch.__version__}"
    )
    print("shape                context   batch    ms/step  roofline  fraction    tokens/s  kernels")
    errors: dict[str, float] = {}
    results = []
    for model, context, batch in cases:
        shape = resolve_shape(model)
        if model not in errors:
            errors[model] = step_error(shape)
        if not errors[model] < CLOSE:
            print(f"{model:20s} not measured: the fused step is {errors[model]:.2g} away from plain PyTorch")
            continue
        try:
            result = measure(
                shape, shape.placement, context=context, batch=batch, device="cuda", dtype=torch.bfloat16,
                prefill_context=None, seconds=options.seconds, ceilings=ceilings,
            )  # fmt: skip
        except MachineError as error:
            print(f"{model:20s} {format_size(context):>7s} {batch:>7}  {error}")
            continue
        results.append({**result.as_dict(), "step_error": errors[model]})
        print(
            f"{model:20s} {format_size(context):>7s} {result.batch:7d} {result.step_ms:10.3f} {result.floor_ms:9.3f} "
            f"{result.floor_fraction:9.2f} {result.decode_tok_s:11,.0f} {result.launches or '':>8}"
        )
        torch.cuda.empty_cache()
    write_json(options.out, results)
    return int(any(not error < CLOSE for error in errors.values()))


def parse_case(text: str) -> tuple[str, int, int | Literal["max"]]:
    """`MODEL:CONTEXT:BATCH`. Raises UserError."""
    parts = text.split(":")
    if len(parts) != 3:
        raise UserError(f"bad case {text!r}: write MODEL:CONTEXT:BATCH, as {CASES[0]}")
    return parts[0], parse_size(parts[1]), "max" if parts[2] == "max" else parse_size(parts[2])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE")
    parser.add_argument("--seconds", type=float, default=1.0, help="decoding time of a case")
    return run(parser, measure_all, arguments)


if __name__ == "__main__":
    sys.exit(main())
