"""How much faster than Qwen3-1.7B a Jet-Nemotron-2B decodes and prefills, by context, beside the paper's figures.

    python benchmarks/speedup.py [--contexts 4k,16k,64k] [--out FILE.json] > table.md

Both shapes have random weights. Decoding starts from full caches, at the published batch (or the largest one that fits)
and at the batch of the slower model; --prompt-tokens are read as prompts. The limit is the ratio if both models were at
the roofline that the same run measures; for prompts it counts operations alone. Before the first speed of a shape its
decode step is checked as decode.py does. If that fails, the shape is not measured and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.common import need_gpu, parser_of, provenance, run, write_json
from benchmarks.decode import CLOSE, step_error
from nasbench.checkpoints.load import random_decoder
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import MachineError
from nasbench.core.sizes import format_size, parse_size, parse_sizes
from nasbench.model.decoder import Decoder
from nasbench.model.shapes import ModelSpec
from nasbench.runtime import throughput
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import Ceilings, measure_ceilings

FAST, SLOW = "jet-nemotron-2b", "qwen3-1.7b"
CONTEXTS = tuple(4096 << power for power in range(7))
BATCHES = dict(zip(CONTEXTS, (1024, 512, 512, 256, 128, 128, 64), strict=True))
"""Published batches of the 2B by context, arXiv 2508.15884."""
PUBLISHED = {
    "decode": dict(zip(CONTEXTS, (15.6, 23.3, 39.6, 44.1, 47.5, 51.6, 53.6), strict=True)),
    "decode, same batch": {},
    "prefill": dict(zip(CONTEXTS, (1.14, 1.15, 1.37, 1.74, 2.54, 4.03, 6.14), strict=True)),
}
"""Published speed-ups on an H100, by what is compared."""


@dataclass(frozen=True)
class Point:
    """One measurement: `what` is a key of PUBLISHED; tok_s counts the tokens of all sequences, floor_ms is the roofline
    at the rates of the same run."""

    model: str
    context: int
    what: str
    batch: int
    tok_s: float
    ms: float
    floor_ms: float

    @property
    def floor_tok_s(self) -> float:
        return self.tok_s * self.ms / self.floor_ms


def prompt_flops(shape: ModelSpec, context: int) -> int:
    """FLOPs of one prompt without the output matrix, which only the last token needs."""
    return sum(spec.flops(context, 0) for spec in (*shape.mixers(shape.placement), *shape.ffns()))


def wanted(name: str, context: int, points: Sequence[Point], prompt_tokens: int) -> dict[str, list[Any]]:
    """What is measured of a model -> batches to try in order; "max" is the largest one that fits."""
    prompts = {"prefill": [max(1, prompt_tokens // context)]}
    if name == SLOW:
        return {"decode": ["max"], **prompts}
    published = [BATCHES[context]] if context in BATCHES else []
    same = [p.batch for p in points if (p.model, p.context, p.what) == (SLOW, context, "decode")]
    return {"decode": [*published, "max"], **({"decode, same batch": same} if same else {}), **prompts}


def measure(
    decoder: Decoder, context: int, what: str, batches: Sequence[Any], seconds: float, ceilings: Ceilings
) -> Point:
    """At the first batch that fits. Raises MachineError where none does."""
    shape = decoder.shape
    for batch in batches:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            if what == "prefill":
                floor_ms = 1e-9 * batch * prompt_flops(shape, context) / ceilings.matmul_tflop_s
                ms = 1e3 * throughput.measure_prefill(decoder, context, batch)[0]
                return Point(shape.name, context, what, batch, 1e3 * batch * context / ms, ms, floor_ms)
            result = throughput.measure(
                shape, shape.placement, context=context, batch=batch, decoder=decoder, prefill_context=None,
                seconds=seconds, ceilings=ceilings,
            )  # fmt: skip
            return Point(shape.name, context, what, result.batch, result.decode_tok_s, result.step_ms, result.floor_ms)
        except MachineError as error:
            reason = error
    raise reason


def table(points: Sequence[Point]) -> list[str]:
    """Lines of the comparisons whose two sides are there."""
    lines = [
        "| | context | batch | Jet-Nemotron-2B tokens/s | batch | Qwen3-1.7B tokens/s | ratio | paper | limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by = {(point.model, point.context, point.what): point for point in points}
    for what, published in PUBLISHED.items():
        for context in sorted({point.context for point in points}):
            fast, slow = by.get((FAST, context, what)), by.get((SLOW, context, what.partition(",")[0]))
            if fast and slow:
                cells = [f"{p.batch} | {p.tok_s:,.0f} ({p.floor_ms / p.ms:.2f})" for p in (fast, slow)]
                ratio, limit = fast.tok_s / slow.tok_s, fast.floor_tok_s / slow.floor_tok_s
                lines.append(
                    f"| {what} | {format_size(context)} | {' | '.join(cells)} | {ratio:.3g} | "
                    f"{published.get(context, '')} | {limit:.3g} |"
                )
    return [*lines, "", "In brackets: the roofline fraction. Paper: arXiv 2508.15884, an H100."]


def work(options: argparse.Namespace) -> int:
    contexts, prompt_tokens = parse_sizes(options.contexts), parse_size(options.prompt_tokens)
    need_gpu()
    ceilings = measure_ceilings("cuda", free_bytes("cuda"), torch.bfloat16)
    points: list[Point] = []
    code = 0
    for shape in map(resolve_shape, (SLOW, FAST)):
        if not (error := step_error(shape)) < CLOSE:
            print(f"{shape.name} is not measured: its step is {error:.2g} away from plain PyTorch", file=sys.stderr)
            code = 1
            continue
        decoder = random_decoder(shape, shape.placement, dtype=torch.bfloat16, device="cuda")
        for context in contexts:
            for what, batches in wanted(shape.name, context, points, prompt_tokens).items():
                try:
                    points.append(measure(decoder, context, what, batches, options.seconds, ceilings))
                    print(points[-1], file=sys.stderr, flush=True)
                except MachineError as problem:
                    print(f"{what} {format_size(context)}, {shape.name}: {problem}", file=sys.stderr, flush=True)
                write_json(options.out, {**provenance(), "points": [asdict(point) for point in points]})
        del decoder
    print("\n".join([*table(points), ", ".join(f"{k}: {v}" for k, v in provenance().items())]))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--contexts", default=",".join(map(format_size, CONTEXTS)))
    parser.add_argument("--prompt-tokens", default="128k", help="of all prompts of a point, at least one prompt")
    parser.add_argument("--seconds", type=float, default=0.3, help="decoding time of a point")
    return run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
