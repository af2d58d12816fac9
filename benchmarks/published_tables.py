"""The published tables of arXiv 2508.15884 beside what the profiles say: cache, throughput at 64K, speed-up by context.

    python benchmarks/published_tables.py [--db profiles] [--out reports/published-tables]

Rows that were measured on a device count first (`nasbench profile --model NAME --blocks AWJ` for each of MODELS); where
there are none they are roofline estimates (nasbench.profiling.estimate), made anew here from the device's own measured
rows of other shapes or, without any, from those of all measured GPUs. Every figure that rests on an estimate is marked.
The limit is the least time of a step: bytes over bandwidth, operations over rate, by the profile's ceilings where the
device was measured, else by its data sheet. Writes README.md and figures.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import NasbenchError, UserError
from nasbench.core.sizes import format_size, profiles_dir
from nasbench.cost import CostModel, find_profiles, load_cost_model, profiled_devices
from nasbench.cost.model import INTERVAL_SD
from nasbench.devices import DEVICES, DeviceSpec
from nasbench.model.shapes import ModelSpec
from nasbench.profiling.estimate import Estimator
from nasbench.profiling.plan import plan
from nasbench.profiling.sweep import CHUNKS
from nasbench.runtime.memory import USABLE, sequence_bytes, weight_bytes
from nasbench.runtime.roofline import Ceilings, decode_floor
from nasbench.search.table import write_rows
from nasbench.store import CEILING, Row

WIDTH, DTYPE, CHUNK = 2, "bf16", CHUNKS["cuda"]
CONTEXTS = tuple(4096 << power for power in range(7))
LONG = 65536
MOST = 1024
MODELS = {
    "qwen2.5-1.5b": "A",
    "qwen3-1.7b": "A",
    "llama3.2-3b": "A",
    "jet-nemotron-2b": "AWJ",
    "jet-nemotron-4b": "AWJ",
}
"""Shapes of the tables and the kinds that they are made of. The first has the layers of jet-nemotron-2b."""
CACHE_MIB = {
    "qwen2.5-1.5b": 1792, "qwen3-1.7b": 7168, "llama3.2-3b": 7168, "jet-nemotron-2b": 154, "jet-nemotron-4b": 258,
}  # fmt: skip
TOK_S = {"qwen2.5-1.5b": 241, "qwen3-1.7b": 61, "llama3.2-3b": 60, "jet-nemotron-2b": 2885, "jet-nemotron-4b": 1271}
"""Published for an H100 at 64K."""
BATCHES = dict(zip(CONTEXTS, (1024, 512, 512, 256, 128, 128, 64), strict=True))
"""Published batches of the 2B by context; of the other models none is, so theirs is the largest that fits."""
SPEED_UP = {
    "prefill": dict(zip(CONTEXTS, (1.14, 1.15, 1.37, 1.74, 2.54, 4.03, 6.14), strict=True)),
    "decode": dict(zip(CONTEXTS, (15.6, 23.3, 39.6, 44.1, 47.5, 51.6, 53.6), strict=True)),
}
"""Published, of jet-nemotron-2b over qwen3-1.7b on an H100."""
EDGE = {"nvidia-jetson-agx-orin-64gb": 8.84, "nvidia-rtx-3090": 6.5}
"""Published, decoding of jet-nemotron-2b over qwen2.5-1.5b at 64K."""
PUBLISHED_DEVICE, OTHER_DEVICE = "nvidia-h100-sxm", "nvidia-h200"
NAN = float("nan")


@dataclass(frozen=True)
class Speed:
    """Tokens/s of all sequences, half the width of its 90 % interval as a share of it, and what the rows are."""

    tok_s: float = NAN
    error: float = NAN
    source: str = "not profiled"


@dataclass(frozen=True)
class Figure:
    """A published number and ours: a row of figures.csv. NaN is a number that there is not.

    Attributes:
        batch: of the model; of a speed-up, the faster model's.
        baseline_batch: of a speed-up, the slower model's.
        error: half the width of the 90 % interval, as a share of ours.
        limit: what the device's memory and matrix units allow; of a speed-up, with both models at their limits.
        share, baseline_share: of its own limit that the model reaches here, and of a speed-up the slower model.
        source: measured or estimated rows, or the formula.
    """

    table: str
    model: str
    device: str
    context: int
    batch: int
    baseline_batch: int
    published: float
    ours: float
    error: float
    limit: float
    share: float
    baseline_share: float
    source: str


class Device:
    """A device's cost models and limits.

    Args:
        rows: its own measured ones.
        costs: by model, measured before estimated.
    """

    def __init__(self, spec: DeviceSpec, rows: Sequence[Row], costs: dict[str, list[CostModel]]) -> None:
        self.spec, self.costs = spec, costs
        known = {row.args: row for row in rows if row.block == CEILING and row.status == "ok"}
        self.days = sorted({row.measured_utc[:10] for row in rows})

        def figure(name: str, column: str, sheet: float) -> float:
            return getattr(known[name], column) if name in known else sheet

        bandwidth, rate = spec.bandwidth_gb_s, spec.tflop_s
        copy = figure("copy", "gb_s", bandwidth)
        self.ceilings = Ceilings(figure("read", "gb_s", bandwidth), copy, copy, figure("matmul", "tflop_s", rate))

    def largest_batch(self, shape: ModelSpec, context: int) -> int:
        """Sequences that fit, at most MOST; 0 for none."""
        room = USABLE["cuda"] * self.spec.memory_bytes - weight_bytes(shape, shape.placement, WIDTH)
        return max(0, min(MOST, int(room // sequence_bytes(shape, shape.placement, context, WIDTH))))

    def batch(self, shape: ModelSpec, context: int) -> int:
        """The published batch where there is one and it fits, else the largest."""
        largest = self.largest_batch(shape, context)
        return min(largest, BATCHES[context]) if shape.name == "jet-nemotron-2b" else largest

    def speed(self, mode: str, shape: ModelSpec, context: int, batch: int) -> Speed:
        """Without a number where it does not fit or no rows cover it."""
        for costs in self.costs[shape.name] if batch else ():
            with suppress(UserError):
                if mode == "decode":
                    cost = costs.decode(shape.placement, context, batch)
                    tok_s, error = cost.decode_tok_s or NAN, (cost.step_stderr_ms or NAN) / (cost.step_ms or NAN)
                else:
                    cost = costs.prefill(shape.placement, context, batch, chunk=CHUNK)
                    tok_s = cost.prefill_tok_s or NAN
                    error = (cost.prefill_stderr_tok_s or NAN) / tok_s
                return Speed(tok_s, INTERVAL_SD * error, cost.source)
        return Speed()

    def limit_tok_s(self, mode: str, shape: ModelSpec, context: int, batch: int) -> float:
        if not batch:
            return NAN
        if mode == "decode":
            parts = decode_floor(shape, shape.placement, batch, context, WIDTH, self.ceilings)
            return batch * 1e3 / sum(part.ms for part in parts)
        flops = sum(config.flops(context, 0) for config in shape.mixers(shape.placement))
        flops += 2 * context * shape.num_layers * shape.mlp_parameters()
        return context * self.ceilings.matmul_tflop_s * 1e12 / flops


def devices(db: Path) -> dict[str, Device]:
    """The devices of the tables, each with its measured rows and estimates of what has none.

    Raises:
        UserError: no measured rows of any GPU.
    """
    shapes = {name: resolve_shape(name) for name in MODELS}
    measured = {
        slug: [row for row in find_profiles(slug, db) if row.source == "measured"]
        for slug in profiled_devices(db)
        if slug in DEVICES
    }
    every = [row for rows in measured.values() for row in rows]
    found = {}
    for slug in (PUBLISHED_DEVICE, OTHER_DEVICE, *EDGE):
        spec, own = DEVICES[slug], measured.get(slug, [])
        estimator = Estimator(own or every, DTYPE)
        costs: dict[str, list[CostModel]] = {}
        for name, shape in shapes.items():
            points = plan(
                shape, MODELS[name], CONTEXTS, ["auto"], ("decode", "prefill"), CHUNK, spec.memory_bytes, WIDTH
            )
            estimated = estimator.rows(spec, shape, [point for group in points for point in group])
            costs[name] = [load_cost_model(slug, shape, DTYPE, db)] if own else []
            costs[name].append(CostModel(estimated, shape, DTYPE))
        found[slug] = Device(spec, own, costs)
    return found


def figures(found: dict[str, Device]) -> list[Figure]:
    """Every published number with ours."""
    shapes = {name: resolve_shape(name) for name in MODELS}
    jet, qwen3, qwen2 = (shapes[name] for name in ("jet-nemotron-2b", "qwen3-1.7b", "qwen2.5-1.5b"))
    rows = []
    for name, shape in shapes.items():
        mib = shape.cache_bytes(shape.placement, 1, LONG, WIDTH) / 2**20
        numbers = (CACHE_MIB[name], mib, NAN, NAN, NAN, NAN)
        rows.append(Figure("cache MiB", name, "", LONG, 1, 0, *numbers, "formula"))
    for slug in (PUBLISHED_DEVICE, OTHER_DEVICE):
        device = found[slug]
        for name, shape in shapes.items():
            batch = device.batch(shape, LONG)
            ours, limit = device.speed("decode", shape, LONG, batch), device.limit_tok_s("decode", shape, LONG, batch)
            numbers = (TOK_S[name], ours.tok_s, ours.error, limit, ours.tok_s / limit, NAN)
            rows.append(Figure("decode tokens/s", name, slug, LONG, batch, 0, *numbers, ours.source))
        for mode, published in SPEED_UP.items():
            for context in CONTEXTS:
                rows.append(_speed_up(device, mode, jet, qwen3, context, published[context]))
    for slug, value in EDGE.items():
        rows.append(_speed_up(found[slug], "decode", jet, qwen2, LONG, value))
    return rows


def _speed_up(device: Device, mode: str, fast: ModelSpec, slow: ModelSpec, context: int, published: float) -> Figure:
    batches = [device.batch(shape, context) for shape in (fast, slow)]
    pairs = list(zip((fast, slow), batches, strict=True))
    ours = [device.speed(mode, shape, context, batch) for shape, batch in pairs]
    limits = [device.limit_tok_s(mode, shape, context, batch) for shape, batch in pairs]
    sources = {speed.source for speed in ours}
    source = next((name for name in ("not profiled", "estimated") if name in sources), "measured")
    shares = [speed.tok_s / limit for speed, limit in zip(ours, limits, strict=True)]
    error = sum(speed.error**2 for speed in ours) ** 0.5
    return Figure(
        table=f"{mode} speed-up over {slow.name}", model=fast.name, device=device.spec.slug, context=context,
        batch=batches[0], baseline_batch=batches[1], published=published, ours=ours[0].tok_s / ours[1].tok_s,
        error=error, limit=limits[0] / limits[1], share=shares[0], baseline_share=shares[1], source=source,
    )  # fmt: skip


def sentence(figure: Figure) -> str:
    """What stands between the published number and ours."""
    if figure.ours != figure.ours:
        return "No rows of this shape." if figure.batch else "Does not fit."
    ratio = figure.ours / figure.published
    if figure.table == "cache MiB":
        if abs(ratio - 1) < 1e-9:
            return "The same to the MiB."
        return (
            "128 of full attention, 2.25 of windows, 27 of fp32 states; the paper's number would be 1 MiB a layer "
            "instead of 1.125 for the last two, and it does not say how it counts."
        )
    if figure.table == "decode tokens/s":
        card = "" if figure.device == PUBLISHED_DEVICE else " of this larger card"
        theirs = figure.published / figure.limit
        why = "; launches bind the paper's, memory ours" if theirs < 0.5 < figure.share else ""
        return f"{ratio:.1f} times the paper's, which is {theirs:.0%} of the limit{card}, ours {figure.share:.0%}{why}."
    both = f"ours reach {figure.share:.0%} (hybrid) and {figure.baseline_share:.0%} (baseline) of their limits"
    if abs(ratio - 1) <= 0.15:
        return f"Within 15 % of the paper's; {both}."
    word = "More" if ratio > 1 else "Less"
    if figure.device in EDGE:
        return f"{word} at the largest batches that fit, the paper's are not stated; {both}."
    if ratio < 1 < figure.published / figure.limit:
        return (
            f"{word}: the paper's is beyond the limits' ratio, so its baseline is the further from its limit; {both}."
        )
    if ratio > 1 and figure.share > figure.baseline_share:
        return f"{word}, because our baseline is further from its limit than our hybrid; {both}."
    if ratio < 1 and figure.share < figure.baseline_share:
        return f"{word}, because our hybrid is further from its limit than our baseline; {both}."
    return f"{word}; {both}."


def readme(rows: Iterable[Figure], found: dict[str, Device]) -> str:
    rows = list(rows)
    lines = [
        "# The published tables and this instrument",
        "",
        "    python benchmarks/published_tables.py",
        "",
        "Figures of arXiv 2508.15884 beside those of the profiles in `profiles/`, measured layer by layer and added up",
        "by the cost model. Batches are the paper's for the 2B, the largest that fits for the others, at most 1024.",
        f"Prompts are read in chunks of {CHUNK} tokens, the paper's in 2048.",
        "",
        *_basis(found),
        "",
        "Figures in *italics* rest on roofline estimates; ± is half a 90 % interval. The limit is the least time of a",
        "step, bytes over bandwidth and operations over rate; of a speed-up, the ratio of both limits, exceeded where",
        "the baseline is the further from its own. The paper's steps launch kernel by kernel, ours replay one CUDA",
        "graph of fused kernels.",
    ]
    for table in dict.fromkeys(row.table for row in rows):
        some = [row for row in rows if row.table == table]
        lines += ["", f"## {table[0].upper()}{table[1:]}", ""]
        if not some[0].device:
            lines += ["| model | context | paper | ours | |", "|---|---|---|---|---|"]
        else:
            both = "batches" if some[0].baseline_batch else "batch"
            lines += [
                f"| model | device | context | {both} | paper | ours | limit | |",
                "|---|---|---|---|---|---|---|---|",
            ]
        lines += map(_line, some)
    return "\n".join(lines) + "\n"


def _basis(found: dict[str, Device]) -> list[str]:
    """What was measured on each device."""
    lines = []
    for device in found.values():
        if device.days:
            when = " to ".join(dict.fromkeys((device.days[0], device.days[-1])))
            lines.append(
                f"- {device.spec.title}: measured {when}; shapes without rows by roofline from its other rows."
            )
        else:
            lines.append(f"- {device.spec.title}: estimated from the measured cards and its data sheet.")
    return lines


def _line(row: Figure) -> str:
    ours = _number(row.ours)
    if row.source == "estimated" and ours:
        ours = f"*{ours}*"
    if row.error == row.error and ours:
        ours += f" ± {row.error:.0%}"
    start = f"| {row.model} | "
    if row.device:
        batches = f"{row.batch} : {row.baseline_batch}" if row.baseline_batch else f"{row.batch}"
        limit = f" {_number(row.limit)} |"
        return (
            f"{start}{row.device} | {format_size(row.context)} | {batches} | {_number(row.published)} | {ours} |"
            f"{limit} {sentence(row)} |"
        )
    return f"{start}{format_size(row.context)} | {_number(row.published)} | {ours} | {sentence(row)} |"


def _number(value: float) -> str:
    if value != value:
        return ""
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.6g}" if abs(value * 100 % 1) < 1e-9 else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", type=Path, help="folder of the profile databases; default: those that ship")
    parser.add_argument("--out", type=Path, default=Path("reports/published-tables"))
    options = parser.parse_args(arguments)
    try:
        found = devices(options.db or profiles_dir())
        rows = figures(found)
        options.out.mkdir(parents=True, exist_ok=True)
        write_rows(options.out / "figures.csv", Figure, rows)
        (options.out / "README.md").write_text(readme(rows, found), encoding="utf-8")
    except NasbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    counts = {source: sum(row.source == source for row in rows) for source in dict.fromkeys(row.source for row in rows)}
    print(f"{len(rows)} figures in {options.out}: " + ", ".join(f"{n} {source}" for source, n in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
