"""Decode speed of whole models on this GPU, beside the floor that the same run measures.

    python benchmarks/decode.py [--out FILE.json] [--seconds 1] [CASE ...]

A case is MODEL:CONTEXT:BATCH, as jet-nemotron-2b:64k:128; the default is the table of the README. Before a shape's
first speed is printed, its layer kinds' fused steps are held against plain PyTorch in fp32; where that check fails,
nothing of the shape is measured and the exit code is 1. Weights and caches are random, the cache filled to the context.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from nasbench.runtime.fused_step import FusedStep

from benchmarks.kernel_cases import gpu_missing
from nasbench.checkpoints.load import random_decoder
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import MachineError
from nasbench.core.sizes import parse_size
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
"""Relative RMSE of bf16 logits over a step; the exact form runs on the same rounded weights in fp32 on the CPU."""


@torch.inference_mode()
def step_error(shape: ModelSpec) -> float:
    """Relative RMSE of the fused step's logits in bf16 against the plain one's in fp32, after a short prompt.

    The shape with one layer of every name it is made of, at batch 1 and 3.
    """
    names = tuple(dict.fromkeys(shape.placement))
    small = ModelSpec(**{**vars(shape), "num_layers": len(names), "published_placement": ""})
    gpu = random_decoder(small, names, dtype=torch.bfloat16, device="cuda", seed=1)
    cpu = random_decoder(small, names, dtype=torch.float32, device="cpu", seed=1)
    cpu.load_state_dict(gpu.state_dict())
    worst = 0.0
    for batch in (1, 3):
        text = torch.randint(small.vocab_size, (batch, 42))
        cache = gpu.new_cache(batch, 64)
        gpu(text[:, :40].cuda(), cache)
        step = FusedStep(gpu, cache)
        for t in (40, 41):
            ours = step(text[:, t].cuda(), torch.full((batch,), t, device="cuda")).float().cpu()
        exact = cpu(text)[:, -1]
        worst = max(worst, float((ours - exact).norm() / exact.norm()))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE")
    parser.add_argument("--out", type=Path, help="write every result as JSON")
    parser.add_argument("--seconds", type=float, default=1.0, help="decoding time of a case")
    options = parser.parse_args()
    if gpu_missing():
        return 1
    ceilings = measure_ceilings("cuda", free_bytes("cuda"), torch.bfloat16)
    print(
        f"{torch.cuda.get_device_name()}: read {ceilings.read_gb_s:.0f} GB/s, in place {ceilings.in_place_gb_s:.0f}, "
        f"products {ceilings.matmul_tflop_s:.0f} TFLOP/s, torch {torch.__version__}"
    )
    print("shape                context   batch    ms/step     floor  fraction    tokens/s  kernels")
    errors: dict[str, float] = {}
    results = []
    for case in options.cases:
        model, context, batch = case.split(":")
        shape = resolve_shape(model)
        if model not in errors:
            errors[model] = step_error(shape)
            torch.cuda.empty_cache()
        if not errors[model] < CLOSE:
            print(f"{model:20s} not measured: the fused step is {errors[model]:.2g} away from plain PyTorch")
            continue
        try:
            result = measure(
                shape, shape.placement, context=parse_size(context),
                batch="max" if batch == "max" else parse_size(batch), device="cuda", dtype=torch.bfloat16,
                prefill_context=None, seconds=options.seconds, ceilings=ceilings,
            )  # fmt: skip
        except MachineError as error:
            print(f"{model:20s} {context:>7s} {batch:>7s}  {error}")
            continue
        results.append({**result.as_dict(), "step_error": errors[model]})
        print(
            f"{model:20s} {context:>7s} {result.batch:7d} {result.step_ms:10.3f} {result.floor_ms:9.3f} "
            f"{result.floor_fraction:9.2f} {result.decode_tok_s:11,.0f} {result.launches or '':>8}"
        )
        torch.cuda.empty_cache()
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(not error < CLOSE for error in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
