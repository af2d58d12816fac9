"""Training speed on this device: tokens/s of alignment and of supernet steps, teacher included, and where time goes.

    python benchmarks/train.py [--model default] [--names W256,J] [--align 64k,128k] [--supernet 32k] [--documents]

Every figure is of whole steps: batch to the device, teacher, losses, gradients, clipping, AdamW, as training runs
them, on random tokens. Model FLOP/s counts what the mathematics asks for, not what kernels do: the teacher's forward
pass, the student's from the first replaced layer on, gradients of activations behind it and of the trained mixers'
weights, three products with the head. It is shown beside the rate of a large product, measured in the same run.

A built-in shape, as qwen3-1.7b, gets random weights: what a model would cost, before it is fetched.

    torchrun --nproc-per-node 2 benchmarks/train.py --model qwen2.5-1.5b [--shard]

Under torchrun the processes share out the rows of a step, with --shard the weights, too. Tokens/s are of all together;
the utilisation is beside as many devices' products, memory and the profile are the first process's.
"""

from __future__ import annotations

import argparse
import gc
import json
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

from nasbench.checkpoints.load import LoadedModel, load_model, random_decoder
from nasbench.checkpoints.resolve import classify, resolve_shape
from nasbench.cli.common import torch_device, torch_dtype
from nasbench.cli.distill_command import parse_names
from nasbench.core.errors import NasbenchError
from nasbench.core.sizes import format_size, parse_size
from nasbench.data.packing import Corpus
from nasbench.model.shapes import ModelSpec
from nasbench.parallel.context import Workers, workers_of
from nasbench.parallel.fsdp import place_of
from nasbench.reproduce.recipe import Recipe
from nasbench.runs import Run, RunSpec
from nasbench.runtime.clock import synchronise
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import measure_ceilings
from nasbench.spaces.placement import Placement, kind_of
from nasbench.supernet.loop import LossSums
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import Distiller

DOCUMENT_TOKENS = 400
"""Mean length of a document where they are kept apart."""


def random_corpus(shape: ModelSpec, rows: int, sequence: int, documents: bool) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (rows, sequence), generator=generator)
    place = torch.arange(sequence)
    begins = torch.rand(rows, sequence, generator=generator) < 1 / DOCUMENT_TOKENS
    begins[:, 0] = True
    ages = (place - torch.where(begins, place, 0).cummax(1).values).int()
    return Corpus(tokens, tokens[:1], tokens[:1], "random", {"train": ages} if documents else {})


def model_of(name: str, dtype: torch.dtype, device: str, shard: bool = False) -> LoadedModel:
    """A model with its weights; of a built-in shape random ones. On the CPU where they are to be shared out."""
    if classify(name).has_weights:
        return load_model(name, dtype=dtype, device=place_of(shard, device))
    shape = resolve_shape(name)
    # Random numbers are the device's work, also of what then moves.
    decoder = random_decoder(shape, shape.placement, dtype=dtype, device=device).requires_grad_(False)
    if shard:
        decoder.to("cpu")
    # The steps read random tokens, and no text.
    return LoadedModel(decoder, None, shape, "random weights")  # type: ignore[arg-type]


def mixer_flops(shape: ModelSpec, name: str, rows: int, sequence: int) -> tuple[float, float]:
    """(FLOPs of a layer's mixer forward, those of its projections alone)."""
    config = shape.mixer(name)
    return rows * config.flops(sequence, 0), 2.0 * rows * sequence * config.parameters()


def align_flops(shape: ModelSpec, names: Sequence[str], rows: int, sequence: int) -> float:
    """The teacher's layers, and of each trained mixer forward, weights' gradients, and the gradients between its
    projections; its input needs none."""
    whole = _teacher_flops(shape, rows, sequence)
    for name in names:
        forward, projections = mixer_flops(shape, name, rows, sequence)
        whole += shape.num_layers * (2 * projections + 3 * (forward - projections))
    return whole


def supernet_flops(
    shape: ModelSpec, placements: Sequence[Placement], trained: Sequence[str], rows: int, sequence: int
) -> float:
    whole = _teacher_flops(shape, rows, sequence)
    mlp = 6.0 * rows * sequence * shape.hidden_size * shape.intermediate_size
    head = 2.0 * rows * sequence * shape.hidden_size * shape.vocab_size
    for placement in placements:
        first = next((i for i, name in enumerate(placement) if kind_of(name) != "A"), len(placement))
        whole += 3 * head
        for name in placement[first:]:
            forward, projections = mixer_flops(shape, name, rows, sequence)
            whole += 2 * (forward + mlp) + (projections if name in trained else 0)
    return whole


def _teacher_flops(shape: ModelSpec, rows: int, sequence: int) -> float:
    mlp = 6.0 * rows * sequence * shape.hidden_size * shape.intermediate_size
    return shape.num_layers * (mixer_flops(shape, "A", rows, sequence)[0] + mlp)


def measure(distiller: Distiller, stage: str, steps: int, top: int) -> dict[str, Any]:
    """Times `steps` steps after a warm-up and profiles one more."""
    optimizer = distiller.optimizer(stage)
    sums = LossSums(["", *optimizer.groups], distiller.device)
    shape, space = distiller.net.teacher.shape, distiller.net.space
    rows, sequence = distiller.step_rows(stage), distiller.corpus.sequence
    trained = [name for name in space.names if kind_of(name) not in ("A", *distiller.config.frozen)]
    cuda = distiller.device.type == "cuda"

    def step(index: int) -> None:
        distiller.step(stage, index, optimizer, sums)
        optimizer.apply(1.0)

    for index in range(2):
        step(index)
    synchronise(distiller.device)
    began = time.perf_counter()
    for index in range(2, 2 + steps):
        step(index)
    launched = time.perf_counter() - began
    synchronise(distiller.device)
    seconds = (time.perf_counter() - began) / steps
    if stage == "align":
        flops = align_flops(shape, trained, rows, sequence)
    else:
        sampled = [distiller.placements(index) for index in range(2, 2 + steps)]
        flops = sum(supernet_flops(shape, placements, trained, rows, sequence) for placements in sampled) / steps
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step(2 + steps)
        synchronise(distiller.device)
    averages = profiler.key_averages()
    times = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in averages
    }
    busy_us = sum(us for us, _ in times.values())
    found = sorted(times.items(), key=lambda item: -item[1][0])[:top]
    distiller.forget_graph()
    return {
        "stage": stage, "step_tokens": rows * sequence, "sequence": sequence, "steps": steps,
        "documents": bool(distiller.corpus.ages), "step_ms": seconds * 1e3, "tok_s": rows * sequence / seconds,
        "launch_ms": launched / steps * 1e3, "device_busy_ms": busy_us / 1e3,
        "processes": distiller.workers.size, "shard": distiller.config.shard,
        "model_tflop": flops / 1e12, "model_tflop_s": flops / seconds / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "kernels": [{"name": key, "ms": us / 1e3, "count": count, "share": us / busy_us} for key, (us, count) in found],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--names", default="W256,J", help="kinds that are trained beside full attention")
    parser.add_argument("--sequence", default="2k")
    parser.add_argument("--align", default="64k,128k", help="tokens of an alignment step, several with commas; 0: none")
    parser.add_argument("--supernet", default="32k", help="tokens of a supernet step; 0: none")
    parser.add_argument("--documents", action="store_true", help="also with documents of a row kept apart")
    parser.add_argument("--recompute", action="store_true", help="also with activations computed again")
    parser.add_argument("--graphs", action="store_true", help="also with layers replayed from CUDA graphs")
    parser.add_argument(
        "--shard", action="store_true", help="under torchrun: each process holds its share of the weights"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--top", type=int, default=14, help="kernels that are listed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--out", type=Path, help="write every result as JSON")
    try:
        return run(parser.parse_args())
    except NasbenchError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code


def cases(options: argparse.Namespace) -> list[tuple[str, DistillConfig, int]]:
    """(stage, settings, tokens of a step) of every run."""
    plain = replace(Recipe().training, documents=False, shard=options.shard)
    variants = [plain]
    variants += [replace(plain, documents=True, repeat_share=0.0)] if options.documents else []
    variants += [replace(plain, recompute=True)] if options.recompute else []
    variants += [replace(plain, graphs=True)] if options.graphs else []
    found = []
    for config in variants:
        for stage, sizes in (("align", options.align), ("supernet", options.supernet)):
            if stage == "align" and (config.recompute or config.graphs):
                continue
            for text in sizes.split(",") if sizes != "0" else ():
                size = parse_size(text)
                found.append((stage, config.updated({f"{stage}_batch_tokens": size}), size))
    return found


def run(options: argparse.Namespace) -> int:
    with workers_of(torch_device(options.device)) as (workers, device):
        return run_with(options, workers, device)


def run_with(options: argparse.Namespace, workers: Workers, device: str) -> int:
    """What one of the processes does; the first one tells."""
    dtype = torch_dtype(options.dtype)
    shape, sequence = resolve_shape(options.model), parse_size(options.sequence)
    names = parse_names(options.names, shape)
    cuda = device.startswith("cuda")
    rate = measure_ceilings(device, free_bytes(device), dtype).matmul_tflop_s
    where = torch.cuda.get_device_name() if cuda else "CPU"
    many = f"{workers.size} processes, " if workers.size > 1 else ""
    about = f"{where}, {many}{shape.name}, {','.join(names)}, {options.dtype}"
    say(workers, f"{about}: large products at {rate:.1f} TFLOP/s, torch {torch.__version__}")
    loaded: LoadedModel | None = None
    results = []
    for stage, config, size in cases(options):
        corpus = random_corpus(shape, 4 * max(1, size // sequence), sequence, config.documents)
        spec = RunSpec(options.model, names, shape.num_layers, "", sequence)
        with tempfile.TemporaryDirectory() as folder:
            distiller = None
            try:
                loaded = loaded or model_of(options.model, dtype, device, config.shard)
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                distiller = Distiller(
                    Run(Path(folder), spec), loaded, config, threading.Event(), corpus=corpus, workers=workers
                )
                distiller.prepare(0)
                found = measure(distiller, stage, options.steps, options.top)
            except torch.OutOfMemoryError:
                found = None
        distiller = None
        if config.shard:
            # What was shared out cannot be again.
            loaded = None
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        told = ", ".join(name for name in ("documents", "recompute", "graphs", "shard") if getattr(config, name))
        told = told or "plain"
        if found is None:
            say(workers, f"\n{stage} {format_size(size)} ({told}): does not fit in the memory")
            continue
        found |= {"recompute": config.recompute, "graphs": config.graphs, "device": where, "product_tflop_s": rate,
                  "utilisation": found["model_tflop_s"] / rate / workers.size, "torch": torch.__version__}  # fmt: skip
        results.append(found)
        if workers.leads:
            show(found, told)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def say(workers: Workers, line: str) -> None:
    """Prints a line, once."""
    if workers.leads:
        print(line, flush=True)


def show(found: dict[str, Any], told: str) -> None:
    """One run as a few lines."""
    print(
        f"\n{found['stage']} {format_size(found['step_tokens'])} ({told}): {found['tok_s']:,.0f} tokens/s, "
        f"{found['step_ms']:.1f} ms a step (launched in {found['launch_ms']:.1f}, device busy "
        f"{found['device_busy_ms']:.1f}), {found['model_tflop_s']:.1f} model TFLOP/s = {found['utilisation']:.1%} of "
        f"large products, peak {found['peak_bytes'] / 2**30:.1f} GiB"
    )
    for kernel in found["kernels"]:
        print(f"  {kernel['ms']:9.2f} ms {kernel['share']:6.1%} x{kernel['count']:<6d} {kernel['name'][:100]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
