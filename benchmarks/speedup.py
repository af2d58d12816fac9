"""How much faster Jet-Nemotron-2B is than Qwen3-1.7B by context in this engine, beside the published table.

    python benchmarks/speedup.py measure --out DIR [--contexts 4k,...,256k] [--seconds 30] [--step-seconds 0.3]
    python benchmarks/speedup.py report --out DIR

`measure` runs both shapes, random weights in bf16, end to end on this GPU: decode steps of each at its own largest
batch (the 2B's at most the published one) and of the 2B at Qwen3's batch; prompts, as many at once as --prompt-tokens
allow, the same for both. What would take longer than --seconds is left out and said. Every point is added to
DIR/speedup.csv at once, and one that is there is not measured again. Before the first decode step of a shape its fused
step is held against plain PyTorch; where that fails, nothing of the shape is measured and the exit code is 1.

`report` writes DIR/README.md from speedup.csv alone, on any machine; `measure` ends with it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.published_tables import BATCHES, CONTEXTS, SPEED_UP
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import MachineError, NasbenchError, UserError
from nasbench.core.sizes import format_size, parse_size, parse_sizes
from nasbench.model.shapes import ModelSpec
from nasbench.search.table import read_rows, write_rows

FAST, SLOW = "jet-nemotron-2b", "qwen3-1.7b"
TITLES = {FAST: "Jet-Nemotron-2B", SLOW: "Qwen3-1.7B"}
FILE = "speedup.csv"
USUAL_SHARE = 0.4
"""Of the matrix units' rate that a prompt reaches, until a first one has told."""


@dataclass(frozen=True)
class Point:
    """One measurement: a row of speedup.csv.

    Attributes:
        mode: decode, a step at `context` keys; or prefill, prompts of `context` tokens.
        tok_s: tokens per second of all sequences, new ones or those of the prompts.
        ms: of a step, or of all prompts.
        floor_ms: the least time at the rates of the same run, nasbench.runtime.roofline; of prompts, their operations
            at the rate of a large matrix product.
    """

    model: str
    context: int
    batch: int
    mode: str
    tok_s: float
    ms: float
    floor_ms: float
    floor_fraction: float
    device: str
    dtype: str
    torch: str
    driver: str
    measured_utc: str

    @property
    def floor_tok_s(self) -> float:
        return self.tok_s * self.ms / self.floor_ms


@dataclass(frozen=True)
class Pair:
    """The same work by both models."""

    fast: Point
    slow: Point

    @property
    def ratio(self) -> float:
        return self.fast.tok_s / self.slow.tok_s

    @property
    def limit(self) -> float:
        """The ratio if both were at their floors."""
        return self.fast.floor_tok_s / self.slow.floor_tok_s


def prompt_flops(shape: ModelSpec, context: int) -> int:
    """Floating-point operations of one prompt, without the output matrix: only the last token needs it."""
    mixers = sum(config.flops(context, 0) for config in shape.mixers(shape.placement))
    return mixers + 2 * context * shape.num_layers * shape.mlp_parameters()


class Measurement:
    """Adds points to the file until all are there."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from nasbench.devices import detect
        from nasbench.runtime.memory import free_bytes
        from nasbench.runtime.roofline import measure_ceilings

        self.options, self.path = options, options.out / FILE
        self.points, self.dtype = read_rows(self.path, Point), torch.bfloat16
        self.info = detect("cuda")
        self.ceilings = measure_ceilings("cuda", free_bytes("cuda"), self.dtype)
        self.left_out = 0

    def run(self) -> int:
        """The exit code. Qwen3 first: the 2B is measured at its batches, too."""
        from nasbench.checkpoints.load import random_decoder

        red = 0
        for name in (SLOW, FAST):
            shape = resolve_shape(name)
            if all(not self.missing(shape, context) for context in self.options.contexts):
                continue
            if not self.sound(shape):
                red = 1
                continue
            self.share = USUAL_SHARE
            self.decoder = random_decoder(shape, shape.placement, dtype=self.dtype, device="cuda")
            for context in self.options.contexts:
                for mode, batch in self.missing(shape, context):
                    self.measure(shape, context, mode, batch)
            del self.decoder
            self.clear()
        return red

    def clear(self) -> None:
        import torch

        gc.collect()
        torch.cuda.empty_cache()

    def sound(self, shape: ModelSpec) -> bool:
        from benchmarks.decode import CLOSE, step_error

        error = step_error(shape)
        self.clear()
        if not error < CLOSE:
            print(f"{shape.name} is not measured: its fused step is {error:.2g} away from plain PyTorch", flush=True)
        return error < CLOSE

    def known(self, name: str, context: int, mode: str) -> list[int]:
        """Batches that are in the file."""
        here = (name, context, mode, self.info.slug, "bf16")
        return [p.batch for p in self.points if (p.model, p.context, p.mode, p.device, p.dtype) == here]

    def missing(self, shape: ModelSpec, context: int) -> list[tuple[str, int | None]]:
        """(mode, batch) of what is not in the file; None is the largest."""
        found: list[tuple[str, int | None]] = []
        have = self.known(shape.name, context, "decode")
        same = max(self.known(SLOW, context, "decode"), default=None)
        if shape.name == SLOW:
            found += [] if have else [("decode", None)]
        else:
            if not [batch for batch in have if batch != same] and BATCHES.get(context) != same:
                found.append(("decode", None))
            if same is not None and same not in have:
                found.append(("decode", same))
        batch = max(1, self.options.prompt_tokens // context)
        return found if batch in self.known(shape.name, context, "prefill") else [*found, ("prefill", batch)]

    def measure(self, shape: ModelSpec, context: int, mode: str, batch: int | None) -> None:
        began = time.monotonic()
        try:
            point = self.decode(shape, context, batch) if mode == "decode" else self.prefill(shape, context, batch or 1)
        except MachineError as error:
            print(f"{mode:8s}{format_size(context):>6s}  {shape.name} left out: {error}", flush=True)
            self.left_out += 1
            return
        finally:
            self.clear()
        self.points.append(point)
        write_rows(self.path, Point, self.points)
        print(
            f"{mode:8s}{format_size(context):>6s} x {point.batch:<6d}{shape.name:17s}{point.ms:12.3f} ms "
            f"{point.tok_s:12,.0f} tokens/s  {point.floor_fraction:5.2f} of the limit  "
            f"{time.monotonic() - began:5.1f} s",
            flush=True,
        )

    def decode(self, shape: ModelSpec, context: int, batch: int | None) -> Point:
        """At a batch, or at the largest: that of the paper where there is one and it fits."""
        from nasbench.runtime.throughput import measure

        published = BATCHES.get(context) if shape.name == FAST else None
        tries: list[int | str] = [batch] if batch else [published, "max"] if published else ["max"]
        while True:
            try:
                result = measure(
                    shape, shape.placement, context=context, batch=tries[0], decoder=self.decoder, prefill_context=None,
                    seconds=self.options.step_seconds, ceilings=self.ceilings,
                )  # fmt: skip
                break
            except MachineError:
                if not tries[1:]:
                    raise
            del tries[0]
            self.clear()
        return self.point(shape, context, result.batch, "decode", 1, result.step_ms, result.floor_ms)

    def prefill(self, shape: ModelSpec, context: int, batch: int) -> Point:
        from nasbench.runtime.throughput import measure_prefill

        flops = batch * prompt_flops(shape, context)
        floor_s = flops / self.ceilings.matmul_tflop_s / 1e12
        if (expected_s := floor_s / self.share) > self.options.seconds:
            raise MachineError(f"it would take about {expected_s:.0f} s, --seconds is {self.options.seconds:g}")
        seconds, _ = measure_prefill(self.decoder, context, batch)
        # What the longest prompt so far reached: the next one is longer still.
        self.share = floor_s / seconds
        return self.point(shape, context, batch, "prefill", context, seconds * 1e3, floor_s * 1e3)

    def point(
        self, shape: ModelSpec, context: int, batch: int, mode: str, tokens: int, ms: float, floor_ms: float
    ) -> Point:
        import torch

        return Point(
            shape.name, context, batch, mode, batch * tokens / ms * 1e3, ms, floor_ms, floor_ms / ms, self.info.slug,
            "bf16", torch.__version__, self.info.driver, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )  # fmt: skip


def pairs(points: Sequence[Point], context: int) -> dict[str, Pair]:
    """By kind of comparison, those that are there: "largest", each model at its own largest batch; "same", decode at
    the slower model's; "prefill"."""

    def of(model: str, mode: str) -> dict[int, Point]:
        chosen = (p for p in points if (p.model, p.context, p.mode) == (model, context, mode))
        return {point.batch: point for point in chosen}

    found = {}
    fast, slow = of(FAST, "decode"), of(SLOW, "decode")
    if slow:
        most = max(slow)
        if fast and max(fast) >= most:
            found["largest"] = Pair(fast[max(fast)], slow[most])
        if most in fast:
            found["same"] = Pair(fast[most], slow[most])
    fast, slow = of(FAST, "prefill"), of(SLOW, "prefill")
    if shared := fast.keys() & slow.keys():
        found["prefill"] = Pair(fast[max(shared)], slow[max(shared)])
    return found


TABLES = (
    ("largest", "decode", "Decoding, each at its own largest batch", "The 2B's is at most the published."),
    ("same", "decode", "Decoding at the same batch", "The largest of Qwen3; nothing is published."),
    (
        "prefill", "prefill", "Prompts, as many of both",
        "The limit here is the operations alone, at the rate of a large matrix product.",
    ),
)  # fmt: skip
"""(kind of pair, mode, title, what to know)"""


def readme(points: Sequence[Point], out: Path) -> str:
    """Everything that the rows say, device by device. Raises UserError where there are none."""
    if not points:
        raise UserError(f"no rows in {out / FILE}: `speedup.py measure` makes some")
    lines = [
        f"# {TITLES[FAST]} over {TITLES[SLOW]} by context",
        "",
        f"    python benchmarks/speedup.py measure --out {out}",
        f"    python benchmarks/speedup.py report --out {out}",
        "",
        f"Both shapes with random weights in this engine; every number is a row of [{FILE}]({FILE}). Speeds are",
        "tokens/s of all sequences; in brackets stands which share of its limit a speed is. *Paper* is arXiv",
        "2508.15884 on an H100. *Limit* is the ratio if both models took the least time that the device allows, by its",
        "speeds in the same run.",
    ]
    for device in sorted({point.device for point in points}):
        lines += _of_device([point for point in points if point.device == device], device)
    return "\n".join(lines) + "\n"


def _of_device(points: Sequence[Point], device: str) -> list[str]:
    def told(name: str) -> str:
        return ", ".join(sorted({getattr(point, name) for point in points} - {""})) or "none"

    days = sorted({point.measured_utc[:10] for point in points})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    lines = [
        "",
        f"## {device}",
        "",
        f"Measured {when}, {told('dtype')}, torch {told('torch')}, driver {told('driver')}.",
    ]
    contexts = sorted({*CONTEXTS, *(point.context for point in points)})
    for kind, mode, title, note in TABLES:
        lines += ["", f"### {title}", "", note, ""]
        lines += [
            f"| context | batch | {TITLES[FAST]} | batch | {TITLES[SLOW]} | ratio | paper | limit |",
            "|---|---|---|---|---|---|---|---|",
        ]
        missing = []
        for context in contexts:
            pair = pairs(points, context).get(kind)
            if pair is None:
                missing.append(format_size(context))
                continue
            published = SPEED_UP[mode].get(context) if kind != "same" else None
            lines.append(
                f"| {format_size(context)} | {pair.fast.batch} | {_speed(pair.fast)} | {pair.slow.batch} | "
                f"{_speed(pair.slow)} | {pair.ratio:.3g} | {published or ''} | {pair.limit:.3g} |"
            )
        if missing:
            lines += ["", f"Not measured: {', '.join(missing)}."]
    return lines


def _speed(point: Point) -> str:
    return f"{point.tok_s:,.0f} ({point.floor_fraction:.2f})"


def report(options: argparse.Namespace) -> int:
    text = readme(read_rows(options.out / FILE, Point), options.out)
    (options.out / "README.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def measure(options: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise MachineError("no CUDA GPU here: this benchmark measures one")
    options.out.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(options)
    red = measurement.run()
    if measurement.left_out:
        print(f"{measurement.left_out} points left out", file=sys.stderr)
    if measurement.points:
        report(options)
    return red


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "report"))
    parser.add_argument("--out", type=Path, required=True, help="folder of speedup.csv and README.md")
    parser.add_argument("--contexts", default=",".join(map(format_size, CONTEXTS)))
    parser.add_argument("--prompt-tokens", default="128k", help="of all prompts of a point; at least one is read")
    parser.add_argument(
        "--seconds", type=float, default=20, help="a reading of prompts that would take longer is left out"
    )
    parser.add_argument("--step-seconds", type=float, default=0.3, help="decoding time of a point")
    options = parser.parse_args(arguments)
    try:
        options.contexts, options.prompt_tokens = parse_sizes(options.contexts), parse_size(options.prompt_tokens)
        return {"measure": measure, "report": report}[options.what](options)
    except NasbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
