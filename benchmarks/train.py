"""Training speed on this device: tokens/s of alignment and of supernet steps, teacher included, and where time goes.

    python benchmarks/train.py [--model default] [--blocks W256,J] [--align 64k,128k] [--supernet 32k] [--recompute]
    torchrun --nproc-per-node 2 benchmarks/train.py --model qwen2.5-1.5b [--shard]

A figure covers whole steps on random tokens, from the copy to the device to AdamW. Model FLOP/s counts the mathematics:
the teacher's forward pass, the student's from its first replaced layer on, gradients of activations and of the trained
mixers' weights, three products with the head. The utilisation compares it with a large product of the same run. Under
torchrun the processes share the rows of a step; memory and profile are those of the first process.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import parser_of, run, write_json
from nasbench.checkpoints.load import LoadedModel, load_model, random_decoder
from nasbench.checkpoints.resolve import classify, resolve_shape
from nasbench.cli.common import parse_kinds, torch_device, torch_dtype
from nasbench.core.sizes import format_size, parse_size
from nasbench.data.packing import Corpus
from nasbench.model.shapes import ModelSpec
from nasbench.parallel.context import DistContext, dist_context
from nasbench.parallel.fsdp import place_of
from nasbench.runs import Run, RunSpec
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import measure_ceilings
from nasbench.runtime.timing import synchronise
from nasbench.spaces.placement import is_of
from nasbench.supernet.on_paper import step_flops
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import Distiller

DOCUMENT_TOKENS = 400
"""Mean length of a document in packed rows."""
SETTINGS = DistillConfig(frozen=(), solved=(), documents=False, repeat_share=0.5, most_full=0.5, kl_chunk=4096)
"""Every mixer is trained, as recipes for a GPU do."""
SWITCHES = ("documents", "recompute", "graphs", "shard")


def random_corpus(shape: ModelSpec, rows: int, sequence: int, documents: bool) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (rows, sequence), generator=generator)
    place = torch.arange(sequence)
    begins = torch.rand(rows, sequence, generator=generator) < 1 / DOCUMENT_TOKENS
    begins[:, 0] = True
    ages = (place - torch.where(begins, place, 0).cummax(1).values).int()
    return Corpus(tokens, tokens[:1], tokens[:1], "random", {"train": ages} if documents else {})


def model_of(name: str, dtype: torch.dtype, device: str, shard: bool = False) -> LoadedModel:
    """A model with its weights, or a built-in shape with random ones; on the CPU where FSDP will shard them."""
    if classify(name).has_weights:
        return load_model(name, dtype=dtype, device=place_of(shard, device))
    shape = resolve_shape(name)
    # The device draws random numbers faster, even for weights that then move.
    decoder = random_decoder(shape, shape.placement, dtype=dtype, device=device).requires_grad_(False)
    if shard:
        decoder.to("cpu")
    # The steps read random tokens, and no text.
    return LoadedModel(decoder, None, shape, "random weights")  # type: ignore[arg-type]


def measure(distiller: Distiller, stage: str, steps: int, top: int) -> dict[str, Any]:
    """Times `steps` steps after a warm-up and profiles one more."""
    trained_stage = distiller.stage(stage)
    shape, space = distiller.net.teacher.shape, distiller.net.space
    rows, sequence = distiller.step_rows(stage), distiller.corpus.sequence
    trained = [name for name in space.names if not is_of(name, ("A", *distiller.config.frozen))]
    cuda, timed = distiller.device.type == "cuda", range(2, 2 + steps)

    def step(index: int) -> None:
        trained_stage.gradients(index)
        trained_stage.optimizer.apply(1.0)

    for index in range(2):
        step(index)
    synchronise(distiller.device)
    began = time.perf_counter()
    for index in timed:
        step(index)
    launched = time.perf_counter() - began
    synchronise(distiller.device)
    seconds = (time.perf_counter() - began) / steps
    sampled = [None] if stage == "align" else [distiller.placements(index) for index in timed]
    flops = sum(step_flops(shape, rows, sequence, trained, some) for some in sampled) / len(sampled)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step(2 + steps)
        synchronise(distiller.device)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: (getattr(event, field), event.count) for event in profiler.key_averages()}
    busy_us = sum(us for us, _ in times.values())
    found = sorted(times.items(), key=lambda item: -item[1][0])[:top]
    return {
        "stage": stage, "step_tokens": rows * sequence, "sequence": sequence, "steps": steps,
        "documents": bool(distiller.corpus.ages), "step_ms": seconds * 1e3, "tok_s": rows * sequence / seconds,
        "launch_ms": launched / steps * 1e3, "device_busy_ms": busy_us / 1e3,
        "processes": distiller.workers.size, "shard": distiller.config.shard,
        "model_tflop": flops / 1e12, "model_tflop_s": flops / seconds / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "kernels": [{"name": key, "ms": us / 1e3, "count": count, "share": us / busy_us} for key, (us, count) in found],
    }  # fmt: skip


def cases(options: argparse.Namespace) -> list[tuple[str, DistillConfig, int]]:
    """(stage, settings, tokens of a step) of every measurement."""
    config = replace(SETTINGS, **{name: getattr(options, name) for name in SWITCHES})
    config = replace(config, repeat_share=0.0) if config.documents else config
    return [
        (stage, config.updated({f"{stage}_batch_tokens": size}), size)
        for stage, sizes in (("align", options.align), ("supernet", options.supernet))
        for size in map(parse_size, sizes.split(",") if sizes != "0" else ())
    ]


def work(options: argparse.Namespace) -> int:
    with dist_context(torch_device(options.device)) as (workers, device):
        return work_of_process(options, workers, device)


def work_of_process(options: argparse.Namespace, workers: DistContext, device: str) -> int:
    """The same measurements in every process; the first one prints them."""
    dtype, cuda = torch_dtype(options.dtype), device.startswith("cuda")
    shape, sequence = resolve_shape(options.model), parse_size(options.sequence)
    names = parse_kinds(options.blocks, shape)
    rate = measure_ceilings(device, free_bytes(device), dtype).matmul_tflop_s
    title = torch.cuda.get_device_name() if cuda else "CPU"

    def say(line: str) -> None:
        if workers.is_main:
            print(line, flush=True)

    say(f"{title} x {workers.size}, {shape.name}, {','.join(names)}, {options.dtype}: large products at {rate:.1f} "
        f"TFLOP/s, torch {torch.__version__}")  # fmt: skip
    loaded: LoadedModel | None = None
    results = []
    for stage, config, size in cases(options):
        corpus = random_corpus(shape, 4 * max(1, size // sequence), sequence, config.documents)
        spec = RunSpec(options.model, names, shape.num_layers, "", sequence)
        distiller = found = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                loaded = loaded or model_of(options.model, dtype, device, config.shard)
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                target = Run(Path(folder), spec)
                distiller = Distiller(target, loaded, config, threading.Event(), corpus=corpus, workers=workers)
                distiller.prepare(0)
                found = measure(distiller, stage, options.steps, options.top)
            except torch.OutOfMemoryError:
                pass
        distiller = None
        loaded = None if config.shard else loaded  # sharded weights cannot be sharded again
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        variant = ", ".join(name for name in SWITCHES if getattr(config, name)) or "plain"
        if found is None:
            say(f"\n{stage} {format_size(size)} ({variant}): does not fit in the memory")
            continue
        found |= {"recompute": config.recompute, "graphs": config.graphs, "device": title, "product_tflop_s": rate,
                  "utilisation": found["model_tflop_s"] / rate / workers.size, "torch": torch.__version__}  # fmt: skip
        results.append(found)
        say(table(found, variant))
        if workers.is_main:
            write_json(options.out, results)
    return 0


def table(found: dict[str, Any], variant: str) -> str:
    """One measurement as a few lines."""
    lines = [
        f"\n{found['stage']} {format_size(found['step_tokens'])} ({variant}): {found['tok_s']:,.0f} tokens/s, "
        f"{found['step_ms']:.1f} ms a step (launched in {found['launch_ms']:.1f}, device busy "
        f"{found['device_busy_ms']:.1f}), {found['model_tflop_s']:.1f} model TFLOP/s = {found['utilisation']:.1%} of "
        f"large products, peak {found['peak_bytes'] / 2**30:.1f} GiB"
    ]
    for kernel in found["kernels"]:
        lines.append(f"  {kernel['ms']:9.2f} ms {kernel['share']:6.1%} x{kernel['count']:<6d} {kernel['name'][:100]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--blocks", default="W256,J", help="mixers that are trained beside full attention")
    parser.add_argument("--sequence", default="2k")
    parser.add_argument("--align", default="64k,128k", help="tokens of an alignment step, several with commas; 0: none")
    parser.add_argument("--supernet", default="32k", help="tokens of a supernet step; 0: none")
    parser.add_argument("--documents", action="store_true", help="packed documents are kept apart")
    parser.add_argument("--recompute", action="store_true", help="activations are computed again in the backward pass")
    parser.add_argument("--graphs", action="store_true", help="layers are replayed from CUDA graphs")
    parser.add_argument("--shard", action="store_true", help="under torchrun: FSDP shards the weights")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--top", type=int, default=14, help="kernels that are listed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16")
    return run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
