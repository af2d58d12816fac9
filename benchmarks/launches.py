"""Tunes the launches of the decode kernels on this GPU, by what they do to whole captured steps.

    python benchmarks/launches.py [MODEL:CONTEXT:BATCH] [--seconds 120] [--out FILE.json]

One step shows which launches the kernels choose, for any model. Neighbours of each choice are compared with fp32 and
then take its place in the step. The end names those that made it shorter: kernels/nasbench_kernels/linear/README.md
says where to put them. Compare only times of one run: one card differs by more, cold and warm.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.common import need_gpu, parser_of, provenance, run, write_json
from benchmarks.decode import CASES, parse_case
from nasbench.checkpoints.load import random_decoder
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import UserError
from nasbench.model import fused
from nasbench.runtime.graph import capture
from nasbench.runtime.timing import stopwatch

REPLAYS = 13


def work(options: argparse.Namespace) -> int:
    model, context, batch = parse_case(options.case)
    if batch == "max":
        raise UserError(f"bad case {options.case!r}: name a batch, not max")
    need_gpu()
    from nasbench_kernels.common.launch import recorded, tuned
    from nasbench_kernels.tune.candidates import TUNED
    from nasbench_kernels.tune.climb import climb

    shape, device, began = resolve_shape(model), torch.device("cuda"), time.monotonic()
    decoder = random_decoder(shape, shape.placement, dtype=torch.bfloat16, device=device)
    cache, clock = decoder.new_cache(batch, context), stopwatch(device)
    cache.fill_random(context - 1, torch.Generator(device).manual_seed(0))
    decoder.prepare(context)
    tokens = torch.randint(shape.vocab_size, (batch,), device=device)
    positions = torch.full_like(tokens, context - 1)

    def step() -> None:
        tokens.copy_(fused.most_likely(decoder.step_at(tokens, positions, cache)))

    def ms() -> float:
        graph = capture(step)
        graph.replay()
        return 1e3 * statistics.median(clock(graph.replay) for _ in range(REPLAYS))

    with torch.inference_mode():
        with recorded() as asked:
            step()
        chosen = dict(key for key, _ in asked.most_common() if key[0].op in TUNED)
        launches = dict(chosen)
        with tuned(launches):
            first = ms()
            print(f"{options.case}: {first:.3f} ms a step with {len(chosen)} choices")
            last = climb(
                list(chosen), launches, ms, lambda: options.seconds - (time.monotonic() - began), print, device
            )
    better = [f"{tuple(key)}: {launches[key]}, not {chosen[key]}" for key in chosen if launches[key] != chosen[key]]
    print(f"at the end {last:.3f} ms", *better, sep="\n")
    write_json(options.out, {**provenance(), "case": options.case, "first_ms": first, "ms": last, "better": better})
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("case", nargs="?", default=CASES[0], metavar="MODEL:CONTEXT:BATCH")
    parser.add_argument("--seconds", type=float, default=120, help="it ends after this")
    return run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
