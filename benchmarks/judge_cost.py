"""The cost model before whole decode steps and prompts that it never saw.

    python benchmarks/judge_cost.py measure --db DIR --out DIR [--modes prefill,decode] [--count 48] [--seconds 200]
    python benchmarks/judge_cost.py largest --out DIR [--seconds 60]
    python benchmarks/judge_cost.py report --db DIR --out DIR --device NAME

`measure` runs random placements with 0 to all layers of full attention, contexts and batches end to end and adds each
at once to OUT/measured.csv, where a later run finds it; points that calibrate are left out. `largest` looks for the
largest batch that runs beside the one that the memory model says: OUT/largest-batch.csv. `report` predicts every row of
measured.csv from the profile in DIR, on any machine, and writes predictions.csv, predicted-against-measured.png and
README.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import MachineError, NasbenchError, UserError
from nasbench.core.sizes import format_size, parse_sizes
from nasbench.cost import CostModel, add_calibration, judge, load_cost_model
from nasbench.cost.calibration import CalibrationRow, calibration_path, read_calibration
from nasbench.cost.judge import Judged, Judgement
from nasbench.cost.judge_points import MOST_BATCH, JudgePoint, judge_points
from nasbench.model.shapes import ModelSpec
from nasbench.search.table import write_rows
from nasbench.spaces.placement import Placement, count_kind, format_placement, parse_placement
from nasbench.store import db_path

MEMORY = 0.85
"""Share of the memory that a judged batch may fill."""
LONGEST_S = 10.0
"""A prompt that would take longer, by the cost model, is left out."""
BARS = {"mean": 0.05, "worst": 0.12, "spearman": 0.99, "points": 40}
"""Mean and worst error at most, rank correlation and points at least."""


@dataclass(frozen=True)
class Prediction:
    """A row of predictions.csv; tokens/s of all sequences together."""

    mode: str
    placement: str
    full_attention: int
    context: int
    batch: int
    predicted_tok_s: float
    measured_tok_s: float
    error: float
    inside: int
    source: str


def measure(options: argparse.Namespace) -> None:
    import torch

    from nasbench.cost.end_to_end import EndToEnd
    from nasbench.devices import detect
    from nasbench.runtime.memory import sequence_bytes, weight_bytes

    shape, device, dtype = _where(options)
    info, width = detect(device), dtype.itemsize
    contexts = parse_sizes(options.contexts)

    def largest(placement: Placement, context: int) -> int:
        room = MEMORY * info.memory_bytes - weight_bytes(shape, placement, width)
        fits = int(room // sequence_bytes(shape, placement, context, width))
        return min(options.most, fits, MOST_BATCH)

    path = Path(options.out) / "measured.csv"
    known = {_key(row) for row in read_calibration(path)}
    known |= {_key(row) for row in read_calibration(calibration_path(db_path(info.slug, options.db)))}
    costs = _costs(info.slug, shape, options)
    whole = EndToEnd(shape, device, dtype)
    gc.freeze()
    end = time.monotonic() + options.seconds
    torch.manual_seed(0)
    modes = options.modes.split(",")
    for place, mode in enumerate(modes):
        # Each mode its part of what is left.
        until = time.monotonic() + (end - time.monotonic()) / (len(modes) - place)
        points = judge_points(shape, options.blocks, mode, contexts, options.count, largest, options.prompt_tokens)
        done = 0
        for point in points:
            cells = (mode, format_placement(point.placement), point.context, point.batch)
            predicted_s = _predicted_s(costs, point)
            left_s = until - time.monotonic()
            if cells in known or left_s <= 0 or (predicted_s or 0.0) > min(LONGEST_S, left_s):
                continue
            began = time.monotonic()
            try:
                if mode == "decode":
                    row = whole.step(point.placement, point.context, point.batch, options.row_seconds)
                else:
                    row = whole.prompt(point.placement, point.context, point.batch, 6 * options.row_seconds)
            except (MachineError, torch.OutOfMemoryError) as error:
                print(f"left out: {error}", flush=True)
                continue
            add_calibration(path, [row])
            done += 1
            error_text = "" if predicted_s is None else f"{predicted_s * 1e3 / row.time_ms - 1:+.1%}"
            print(
                f"{mode:8s}{format_size(point.context):>6s}{point.batch:6d}{row.time_ms:12.3f} ms {error_text:>7s}  "
                f"{time.monotonic() - began:5.1f} s  {row.placement}",
                flush=True,
            )
        print(f"{mode}: {done} of {len(points)} points measured", flush=True)


def largest(options: argparse.Namespace) -> None:
    from nasbench.cost.end_to_end import EndToEnd, LargestBatch

    shape, device, dtype = _where(options)
    whole = EndToEnd(shape, device, dtype)
    end = time.monotonic() + options.seconds
    layers, long = shape.num_layers, parse_sizes(options.contexts)[-1]
    half = tuple("A" if i % 2 else options.blocks[-1] for i in range(layers))
    cases = [(shape.placement, long), (shape.placement, long // 4), (half, long // 2), (("A",) * layers, long // 4)]
    rows = []
    for placement, context in cases:
        if time.monotonic() > end:
            break
        try:
            row = whole.largest_batch(placement, context)
        except MachineError as error:
            print(f"left out: {error}", flush=True)
            continue
        rows.append(row)
        print(
            f"{format_size(context):>6s}  predicted {row.predicted_batch}, runs {row.largest_batch} "
            f"({row.error:+.1%})  {row.placement}",
            flush=True,
        )
        write_rows(Path(options.out) / "largest-batch.csv", LargestBatch, rows)


def report(options: argparse.Namespace) -> None:
    out = Path(options.out)
    shape = resolve_shape(options.model)
    costs = load_cost_model(options.device, shape, options.dtype, options.db)
    rows = [row for row in read_calibration(out / "measured.csv") if row.model == shape.name]
    judgements = {}
    for mode in ("decode", "prefill"):
        found, refused = _judge(costs, shape, [row for row in rows if row.mode == mode], mode)
        for text in refused:
            print(f"not covered: {text}")
        if found:
            judgements[mode] = found
            _print(found)
    if not judgements:
        raise UserError(f"no measurement of {shape.name} in {out / 'measured.csv'}: `judge_cost.py measure` makes some")
    predictions = [_prediction(shape, mode, row) for mode, found in judgements.items() for row in found.rows]
    write_rows(out / "predictions.csv", Prediction, predictions)
    _draw(judgements, out / "predicted-against-measured.png", shape)
    (out / "README.md").write_text(_readme(judgements, rows, options), encoding="utf-8")


def _judge(
    costs: CostModel, shape: ModelSpec, rows: Sequence[CalibrationRow], mode: str
) -> tuple[Judgement | None, list[str]]:
    """The judgement of what the profile covers, and why not of the rest."""
    measured, refused = [], []
    for row in rows:
        placement = parse_placement(row.placement, shape.num_layers)
        tokens = row.batch * (1 if mode == "decode" else row.context)
        point = (placement, row.context, row.batch, tokens * 1e3 / row.time_ms)
        try:
            judge(costs, [point], mode, chunk=row.chunk or None)
            measured.append(point)
        except UserError as error:
            refused.append(str(error))
    chunks = {row.chunk for row in rows if row.chunk}
    if len(chunks) > 1:
        raise UserError(f"prompts in chunks of {', '.join(map(str, sorted(chunks)))}: judge one size at a time")
    return (judge(costs, measured, mode, chunk=min(chunks, default=None)) if measured else None), refused


def _prediction(shape: ModelSpec, mode: str, row: Judged) -> Prediction:
    full = count_kind(parse_placement(row.placement, shape.num_layers), "A")
    cells = {name: value for name, value in asdict(row).items() if name != "inside"}
    return Prediction(mode=mode, full_attention=full, inside=int(row.inside), **cells)


def _misses(found: Judgement) -> str:
    """The bars that a judgement misses, or ""."""
    held = {
        "mean": found.mean <= BARS["mean"],
        "worst": found.worst <= BARS["worst"],
        "spearman": found.spearman >= BARS["spearman"],
        "points": len(found.rows) >= BARS["points"],
    }
    return ", ".join(name for name, holds in held.items() if not holds)


def _print(found: Judgement) -> None:
    misses = f"  MISSES: {_misses(found)}" if _misses(found) else ""
    print(
        f"{found.mode:8s}{len(found.rows):4d} points: mean error {found.mean:.1%}, worst {found.worst:.1%}, Spearman "
        f"{found.spearman:.4f}, in the 90 % interval {found.inside:.0%}{misses}"
    )
    for row in sorted(found.rows, key=lambda row: -abs(row.error))[:8]:
        print(f"        {row.error:+7.1%}  {format_size(row.context):>5s} x {row.batch:<5d}{row.placement}")
    for name in ("context", "batch"):
        groups: dict[int, list[float]] = {}
        for row in found.rows:
            groups.setdefault(getattr(row, name), []).append(row.error)
        means = ", ".join(f"{format_size(key)} {sum(e) / len(e):+.1%} ({len(e)})" for key, e in sorted(groups.items()))
        print(f"        signed mean by {name}: {means}")


def _draw(judgements: dict[str, Judgement], path: Path, shape: ModelSpec) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    from nasbench.report.style import INK, SOFT, theme

    with theme("judge"):
        figure = Figure(figsize=(9.0, 3.9), layout="constrained", dpi=130)
        panels = figure.subplots(1, len(judgements), squeeze=False)[0]
        for axes, (mode, found) in zip(panels, judgements.items(), strict=True):
            measured = [row.measured_tok_s for row in found.rows]
            ends = [min(measured) * 0.8, max(measured) * 1.25]
            axes.fill_between(ends, [end * 0.88 for end in ends], [end * 1.12 for end in ends], color=SOFT, alpha=0.3)
            axes.plot(ends, ends, color=SOFT, linewidth=1)
            share = [
                count_kind(parse_placement(r.placement, shape.num_layers), "A") / shape.num_layers for r in found.rows
            ]
            points = axes.scatter(
                measured, [row.predicted_tok_s for row in found.rows], c=share, cmap="viridis", s=16, vmin=0, vmax=1
            )
            axes.set(xscale="log", yscale="log", xlabel="measured tokens/s", ylabel="predicted tokens/s")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ends[1] < 20 * ends[0] else (1, 3)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.set_title(f"{mode}: mean error {found.mean:.1%}, worst {found.worst:.1%}", color=INK)
        figure.colorbar(points, ax=list(panels), label="share of full attention")
        figure.savefig(path)


def _readme(judgements: dict[str, Judgement], rows: Sequence[CalibrationRow], options: argparse.Namespace) -> str:
    first = rows[0]
    days = sorted({row.measured_utc[:10] for row in rows})
    lines = [
        f"# The cost model on {options.device}, {first.model}",
        "",
        "Whole decode steps and prompts that the cost model never saw, beside what it says: random placements with 0",
        "to all layers of full attention. The band of the figure is 12 % wide to both sides.",
        "",
        f"    python benchmarks/judge_cost.py measure --model {first.model} --db profiles --out {options.out}",
        f"    python benchmarks/judge_cost.py report --model {first.model} --db profiles --out {options.out} "
        f"--device {options.device}",
        "",
        f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))}, {first.dtype}, torch {first.torch}, "
        f"driver {first.driver or 'none'}.",
        "",
        "| | points | contexts | batches | layers of A | mean error | worst | Spearman | in the 90 % interval |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, found in judgements.items():
        contexts, batches = ([getattr(row, name) for row in found.rows] for name in ("context", "batch"))
        full = [count_kind(parse_placement(row.placement), "A") for row in found.rows]
        lines.append(
            f"| {mode} | {len(found.rows)} | {format_size(min(contexts))} to {format_size(max(contexts))} | "
            f"{min(batches)} to {max(batches)} | {min(full)} to {max(full)} | {found.mean:.1%} | {found.worst:.1%} | "
            f"{found.spearman:.4f} | {found.inside:.0%} |"
        )
    held = [f"{mode.capitalize()} misses {_misses(found) or 'none'}." for mode, found in judgements.items()]
    lines += [
        "",
        f"Bars, of each mode: mean error at most {BARS['mean']:.0%}, worst at most {BARS['worst']:.0%}, Spearman at",
        f"least {BARS['spearman']}, at least {BARS['points']} points. {' '.join(held)}",
    ]
    lines += ["", "![predicted against measured](predicted-against-measured.png)", "", "The worst:", ""]
    lines += [
        "| mode | placement | context | batch | predicted tokens/s | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, found in judgements.items():
        for row in sorted(found.rows, key=lambda row: -abs(row.error))[:3]:
            where = f"| {mode} | `{row.placement}` | {format_size(row.context)} | {row.batch} "
            lines.append(f"{where}| {row.predicted_tok_s:,.0f} | {row.measured_tok_s:,.0f} | {row.error:+.1%} |")
    lines += [
        "",
        "`measured.csv` has every measurement, `predictions.csv` what was said of it. Neither calibrates anything.",
    ]
    return "\n".join(lines) + "\n"


def _key(row: CalibrationRow) -> tuple[str, str, int, int]:
    return row.mode, row.placement, row.context, row.batch


def _where(options: argparse.Namespace) -> tuple[ModelSpec, str, Any]:
    """(shape, torch device, dtype)."""
    from nasbench.cli.common import torch_device, torch_dtype

    return resolve_shape(options.model), torch_device(options.torch_device), torch_dtype(options.dtype)


def _costs(device: str, shape: ModelSpec, options: argparse.Namespace) -> CostModel | None:
    try:
        return load_cost_model(device, shape, options.dtype, options.db)
    except UserError as error:
        print(f"measuring without predictions: {error}", file=sys.stderr)
        return None


def _predicted_s(costs: CostModel | None, point: JudgePoint) -> float | None:
    if costs is None:
        return None
    try:
        if point.mode == "decode":
            step_ms = costs.decode(point.placement, point.context, point.batch).step_ms
            return None if step_ms is None else step_ms / 1e3
        tok_s = costs.prefill(point.placement, point.context, point.batch).prefill_tok_s
        return None if tok_s is None else point.batch * point.context / tok_s
    except UserError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "largest", "report"))
    parser.add_argument("--model", default="jet-nemotron-2b")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--out", required=True, help="folder of the measurements and the report")
    parser.add_argument("--db", type=Path, help="folder of the profile databases")
    parser.add_argument("--device", default="", help="report: name of the profiled device")
    parser.add_argument("--torch-device", default="auto", help="measure, largest: auto, cpu or cuda")
    parser.add_argument("--modes", default="prefill,decode", help="measure: in this order")
    parser.add_argument("--blocks", default="AWJG", help="measure: kinds that placements are made of")
    parser.add_argument("--contexts", default="4k,8k,16k,32k,64k,128k,256k")
    parser.add_argument("--count", type=int, default=48, help="measure: points of each mode")
    parser.add_argument("--most", type=int, default=1024, help="measure: largest batch")
    parser.add_argument("--prompt-tokens", type=int, default=131072, help="measure: tokens of all prompts of a point")
    parser.add_argument("--seconds", type=float, default=1e9, help="measure, largest: time for all points")
    parser.add_argument("--row-seconds", type=float, default=0.4, help="measure: time for the repeats of a point")
    options = parser.parse_args(arguments)
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        {"measure": measure, "largest": largest, "report": report}[options.what](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NasbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is measured is written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
