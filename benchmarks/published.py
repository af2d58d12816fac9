"""The efficiency table of arXiv 2508.15884 on this device: decode at 64K, at one common batch and at the largest.

    python benchmarks/published.py [--out reports/published-tables] [--until 90] [MODEL ...]

Weights are random, caches are full. The largest batch is what fits, at most 4096. Writes efficiency.csv and
efficiency.md. Rows that are there are not measured again: a call that --until ended continues.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import run
from nasbench.checkpoints.load import random_decoder
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import MachineError
from nasbench.core.files import write_text
from nasbench.core.sizes import format_size, parse_size
from nasbench.core.tables import read_table, write_table
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import measure_ceilings
from nasbench.runtime.throughput import measure

PAPER = {
    "jet-nemotron-2b": (2.0, 154, 2885), "qwen3-1.7b": (1.7, 7168, 61), "qwen2.5-1.5b": (1.5, 1792, 241),
    "mamba2-2.7b": (2.7, 80, 2507), "rwkv7-1.5b": (1.5, 24, 3050), "llama3.2-3b": (3.0, 7168, 60),
    "jet-nemotron-4b": (4.0, 258, 1271), "deepseek-v2-lite": (), "gemma3-1b": (), "qwen3-30b-a3b": (),
}  # fmt: skip
"""Parameters (10^9), cache (MiB) and decode tokens/s on an H100 at 64K, where the paper has the model."""
COMMON, LARGEST = "common", "largest"


@dataclass(frozen=True)
class Row:
    """One measurement. Cache is of one sequence by formula; the state of mamba2-2.7b is bf16."""

    model: str
    context: int
    at: str
    batch: int
    parameters_b: float
    cache_mib: float
    decode_tok_s: float
    step_p20_ms: float
    step_ms: float
    step_p80_ms: float
    floor_ms: float
    peak_gib: float
    device: str
    dtype: str
    torch: str
    driver: str
    nasbench: str
    measured_utc: str


def work(options: argparse.Namespace) -> int:
    began, context, path = time.monotonic(), parse_size(options.context), options.out / "efficiency.csv"
    shapes = [resolve_shape(name) for name in options.models]
    device, dtype = torch.device(options.device), torch.bfloat16
    rows, ceilings = read_table(path, Row), measure_ceilings(device, free_bytes(device), dtype)
    for shape in shapes:
        known = {row.at for row in rows if (row.model, row.context) == (shape.name, context)}
        if {COMMON, LARGEST} <= known or time.monotonic() - began > options.until:
            continue
        decoder = random_decoder(shape, shape.placement, dtype=dtype, device=device)
        for at in (at for at in (COMMON, LARGEST) if at not in known):
            gc.collect()
            try:
                found = measure(
                    shape, shape.placement, context=context, batch=options.batch if at == COMMON else "max",
                    decoder=decoder, prefill_context=None, seconds=options.seconds, ceilings=ceilings,
                )  # fmt: skip
            except MachineError as error:
                print(f"{shape.name}, {at}: {error}", file=sys.stderr, flush=True)
                continue
            cache = shape.cache_bytes(shape.placement, 1, context, dtype.itemsize) / 2**20
            told = {name: getattr(found, name) for name in Row.__dataclass_fields__ if hasattr(found, name)}
            sizes = {"parameters_b": shape.parameters() / 1e9, "cache_mib": cache, "peak_gib": found.peak_bytes / 2**30}
            rows.append(Row(**told, at=at, **sizes))
            seconds = f"{time.monotonic() - began:.0f} s"
            print(shape.name, at, rows[-1].batch, f"{found.decode_tok_s:,.0f} tokens/s", seconds, flush=True)
        del decoder
        options.out.mkdir(parents=True, exist_ok=True)
        write_table(path, rows, Row, digits=4)
        write_text(options.out / "efficiency.md", "\n".join(table(rows)) + "\n")
    return 0


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown, one a model and context."""
    speeds = " | ".join(f"{at}: batch | tokens/s | roofline fraction" for at in (COMMON, LARGEST))
    head = f"model | context | parameters (10^9) | paper | cache (MiB) | paper | {speeds} | paper: tokens/s"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    by = {(row.model, row.context, row.at): row for row in rows}
    for model, context in dict.fromkeys(key[:2] for key in by):
        both = [by.get((model, context, at)) for at in (COMMON, LARGEST)]
        one = next(row for row in both if row)
        theirs = [f"{value:,}" for value in PAPER.get(model, ())] or [""] * 3
        cells = [model, format_size(context), f"{one.parameters_b:.2f}", theirs[0], f"{one.cache_mib:,.4g}", theirs[1]]
        for row in both:
            share = f"{row.floor_ms / row.step_ms:.2f}" if row else ""
            cells += [f"{row.batch}", f"{row.decode_tok_s:,.0f}", share] if row else [""] * 3
        lines.append(f"| {' | '.join([*cells, theirs[2]])} |")
    devices = sorted({f"{row.device}, {row.dtype}, torch {row.torch}, {row.measured_utc[:10]}" for row in rows})
    return [*lines, "", f"Here: {'; '.join(devices)}. Paper: an H100, its batches are not all stated."]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(PAPER), metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path("reports/published-tables"))
    parser.add_argument("--context", default="64k")
    parser.add_argument("--batch", type=int, default=8, help="the common one")
    parser.add_argument("--seconds", type=float, default=0.5, help="decoding time of a row")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds after which no model begins")
    parser.add_argument("--device", default="cuda")
    return run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
