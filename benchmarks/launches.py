"""Whether the launches that the decode kernels choose are the best ones on this GPU.

    python benchmarks/launches.py [--shapes jet-nemotron-2b,jet-nemotron-4b] [--batches 1,16,64,128]
                                  [--seconds 60] [--only PART] [--out FILE.json]

products: every matrix product of a decode step, in the chosen launch (*) and in others: for one sequence in other
blocks, for more in other tiles, parts and stages, with and without weights that are asked for early, and by cuBLAS.
Divided products are timed with the `add_norm` that sums their parts. Blocks read rows x columns, w warps; tiles go on
with s stages, p parts, e blocks asked for early, and h where the second-level cache is told what to keep. Turned tiles,
in which the sequences are the rows, begin with t: t128+16/68 is two blocks, of 128 and 16 rows of the weights, of which
a program fills as much as it needs for 68 outputs.
argmax: in parts of several sizes, beside torch's.
states: the JetBlock layers' recurrent step at 64 to 512 sequences, and at those of --batches that are more than one, in
the chosen launch and in others, as TB/s of state read and written and as a fraction of what `mul_` in place reaches on
as many bytes. They read channels of a tile x tiles, p parts, w warps, s stages, r registers at most, e reads and c
writes that the caches need not keep.
steps: whole steps with and without overlapping launches, at 4K for one sequence and at 64K for 128, or 64 where more do
not fit in the memory.

Each result is held against fp32 before it is timed. One that is wrong has no speed; if it is the chosen launch's, the
exit code is 1. Times are medians of CUDA-graph replays over copies of the weights that exceed the L2 cache together.
Repeated runs differ by a few per cent. What to change where another launch is better by more: `gemv_launch`,
`batch_launch`, `swiglu_launch`, `streams`, `step_launch` and `PART` in nasbench_kernels.decode.

--seconds count from the start of the measurements, compilation included, and end what is under way. What they do not
suffice for is named; a second run finds compiled what the first one launched, and comes further.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.kernel_cases import CLOSE, Call, each_us, gpu_missing, pass_tb_s, sets_of
from benchmarks.launch_cases import Product, ProductCase, candidates, products
from benchmarks.state_cases import BATCHES as STATE_BATCHES
from benchmarks.state_cases import StateCase, label, launches, states
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import MachineError, UserError
from nasbench.core.sizes import format_size
from nasbench.model.mixers.gated_delta.spec import JetBlockSpec
from nasbench.model.shapes import ModelSpec

PARTS = ("argmax", "products", "states", "steps")
SHARES = {"argmax": 0.6, "products": 0.6, "states": 0.7, "steps": 1.0}
"""Of the seconds that may be over when something of a part is begun, where all parts are measured."""
STEPS = ((4096, (1,)), (65536, (128, 64)))
"""Context and batches of whole steps, of which the first that fits is measured."""
LOGIT_PARTS = (2048, 4096, 8192)

TimeUs = Callable[[Sequence[Call]], float]


@dataclass(frozen=True)
class Row:
    """One measurement; NaN is a number that there is not.

    Attributes:
        product: Product.part, argmax, a recurrent layer, or a step and its context.
        count: how often a step has it.
        nbytes: of the weights or logits that a call reads, or of the states that it reads and writes; 0 where there are
            others.
        error: relative RMSE against fp32; for argmax the share of sequences with another token.
        status: ok, or why there is no time.
        in_place_tb_s: of states, what `mul_` in place reached on as many bytes.
    """

    shape: str
    product: str
    count: int
    batch: int
    rows: int
    columns: int
    nbytes: int
    kind: str
    launch: str
    us: float
    error: float
    chosen: bool
    status: str
    in_place_tb_s: float = math.nan


def judge(error: Callable[[], float], bound: float, calls: Callable[[], list[Call]], time_us: TimeUs) -> dict[str, Any]:
    """us, error and status of a Row."""
    found = us = math.nan
    try:
        found = error()
        if found <= bound:
            us, status = each_us(time_us, calls()), "ok"
        else:
            status = f"wrong: {found:.1e} away"
    except torch.OutOfMemoryError:
        status = "left out: does not fit in the memory"
    except Exception as problem:  # of what does not compile here
        status = f"does not run: {(str(problem).strip().splitlines() or [type(problem).__name__])[0]}"
    return {"us": us, "error": found, "status": status}


def product_rows(
    shape: ModelSpec, product: Product, count: int, batch: int, *, time_us: TimeUs, left: Callable[[], float],
    device: torch.device, dtype: torch.dtype = torch.bfloat16, sets: int | None = None,
) -> Iterator[Row]:  # fmt: skip
    """A product in its launches, the chosen one first, as long as seconds are left."""
    case = ProductCase(product, batch, device, dtype, sets)
    for candidate in candidates(product, batch, device, dtype):
        if left() <= 0:
            return
        found = judge(partial(case.error, candidate), CLOSE["output"], partial(case.calls, candidate), time_us)
        yield Row(
            shape.name, product.part, count, batch, product.rows, product.columns, case.nbytes,
            candidate.kind, str(candidate), chosen=candidate.chosen, **found,
        )  # fmt: skip


def argmax_rows(
    shape: ModelSpec, batch: int, *, time_us: TimeUs, device: torch.device, dtype: torch.dtype = torch.bfloat16,
    sets: int | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Over few enough logits that some are in the L2 cache, as those that the head has just written are."""
    from nasbench_kernels.decode import argmax
    from nasbench_kernels.decode.argmax import PART

    size = (batch, shape.vocab_size)
    nbytes = batch * shape.vocab_size * dtype.itemsize
    logits = [torch.randn(size, device=device, dtype=dtype) for _ in range(sets or min(40, sets_of(nbytes)))]
    for part in (PART, *(part for part in LOGIT_PARTS if part != PART), None):
        work = partial(torch.argmax, dim=-1) if part is None else partial(argmax, part=part)

        def error(work: Callable[[Tensor], Tensor] = work) -> float:
            """Of values; torch on a GPU may name another of equals."""
            fresh = torch.randn(size, device=device, dtype=dtype)
            return float((fresh.gather(1, work(fresh)[:, None])[:, 0] != fresh.amax(-1)).float().mean())

        found = judge(error, 0.0, lambda work=work: [partial(work, one) for one in logits], time_us)
        yield Row(
            shape.name, "argmax", 1, batch, shape.vocab_size, 1, nbytes, "torch" if part is None else "argmax",
            "torch" if part is None else f"parts of {part}", chosen=part == PART, **found,
        )  # fmt: skip


def state_rows(
    shape: ModelSpec, config: JetBlockSpec, count: int, batch: int, *, time_us: TimeUs, left: Callable[[], float],
    device: torch.device, dtype: torch.dtype = torch.bfloat16, sets: int | None = None,
) -> Iterator[Row]:  # fmt: skip
    """A recurrent layer's step in its launches, the chosen one first, as long as seconds are left."""
    case = StateCase(config, batch, device, dtype, sets)
    in_place = pass_tb_s(time_us, case.nbytes // 2, device, True, len(case.sets))
    for place, launch in enumerate(launches(config, batch, device)):
        if left() <= 0:
            return
        found = judge(partial(case.error, launch), CLOSE["output"], partial(case.calls_of, launch), time_us)
        yield Row(
            shape.name, f"J {config.args}", count, batch, 0, 0, case.nbytes, "recurrent step", label(launch),
            chosen=place == 0, in_place_tb_s=in_place, **found,
        )  # fmt: skip


def step_rows(shape: ModelSpec, device: torch.device) -> Iterator[Row]:
    """Whole steps, overlapping and not."""
    from nasbench_kernels.decode.overlap import dependent, without_overlap

    from benchmarks.decode import CLOSE as STEP_CLOSE
    from benchmarks.decode import step_error
    from nasbench.checkpoints.load import random_decoder
    from nasbench.runtime.memory import free_bytes, largest_batch
    from nasbench.runtime.roofline import measure_ceilings
    from nasbench.runtime.throughput import measure

    able, error = bool(dependent(device)["PDL"]), step_error(shape)
    torch.cuda.empty_cache()
    ceilings = measure_ceilings(device, free_bytes(device), torch.bfloat16)
    decoder = random_decoder(shape, shape.placement, dtype=torch.bfloat16, device=device)
    for context, batches in STEPS:
        fit = largest_batch(shape, shape.placement, context, 2, device, loaded=True)
        batch = next((batch for batch in batches if batch <= fit), batches[-1])
        # Where the card cannot overlap them, there is one kind of step.
        for overlapping in (True, False) if able else (False,):
            us, status = math.nan, f"wrong: {error:.1e} away"
            try:
                if error < STEP_CLOSE:
                    with nullcontext() if overlapping else without_overlap():
                        result = measure(
                            shape, shape.placement, context=context, batch=batch, device=device, dtype=torch.bfloat16,
                            decoder=decoder, prefill_context=None, seconds=0.3, ceilings=ceilings,
                        )  # fmt: skip
                    us, status = 1e3 * result.step_ms, "ok"
            except (MachineError, UserError) as problem:
                status = f"left out: {problem}"
            kind, name = "overlapping" if overlapping else "each waits", f"step {format_size(context)}"
            yield Row(shape.name, name, 1, batch, 0, 0, 0, kind, kind, us, error, overlapping is able, status)
        torch.cuda.empty_cache()


def cases_of(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each thing that was measured in several ways."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row.shape, row.product, row.batch, row.rows, row.columns), []).append(row)
    return list(found.values())


def best_of(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """(chosen, best) of a case; None where the chosen one has no time."""
    timed = [row for row in rows if row.status == "ok"]
    chosen = [row for row in timed if row.chosen]
    return (chosen[0], min(timed, key=lambda row: row.us)) if chosen else None


def speed(row: Row) -> str:
    """us, TB/s where bytes are known, and the fraction of the bandwidth in place where that was measured."""
    tb_s = row.nbytes / row.us / 1e6
    text = f"{row.launch:26s} {row.us:8.1f} us" + (f" {tb_s:5.2f} TB/s" if row.nbytes else "")
    return text if math.isnan(row.in_place_tb_s) else f"{text} {tb_s / row.in_place_tb_s:4.2f} of mul_"


def lines(rows: Sequence[Row]) -> list[str]:
    """Of a case: the chosen launch, the best one, what the choice loses; then those without a time. Of states all."""
    first, pair = rows[0], best_of(rows)
    size = f"{first.rows} x {first.columns}" if first.columns > 1 else ""
    text = f"{first.shape:16s} {first.product:10s} x{first.batch:<4d} {size:>13s}"
    for title, row in zip(("*", " best"), pair or (), strict=False):
        text += f" {title} {speed(row)}"
    if pair:
        text += f"  loses {pair[0].us / pair[1].us - 1:4.0%} of {sum(row.status == 'ok' for row in rows)}"
    every = [] if math.isnan(first.in_place_tb_s) else [row for row in rows if row.status == "ok"]
    text += f"  mul_ {first.in_place_tb_s:.2f} TB/s" if every else ""
    wrong = [f"    {row.launch}: {row.status}" for row in rows if row.status != "ok"]
    return [text, *(f"    {speed(row)}" for row in every), *wrong]


def sums(rows: Sequence[Row]) -> list[str]:
    """What the products of a step take as chosen and at best, of each shape and batch whose products all have times."""
    found = []
    of_products = [case for case in cases_of(rows) if case[0].columns > 1]
    for shape, batch in dict.fromkeys((case[0].shape, case[0].batch) for case in of_products):
        pairs = [best_of(case) for case in of_products if (case[0].shape, case[0].batch) == (shape, batch)]
        known = [pair for pair in pairs if pair]
        if len(known) == len(products(resolve_shape(shape))):
            ours, best = (sum(row.count * row.us for row in column) / 1e3 for column in zip(*known, strict=True))
            found.append(f"{shape} x{batch}: products of a step {ours:.3f} ms as chosen, {best:.3f} at best")
    return found


def exit_code(rows: Sequence[Row]) -> int:
    return int(any(row.chosen and row.status.startswith(("wrong", "does not run")) for row in rows))


class Over(BaseException):
    """The seconds are over. No Exception: nothing but `limit` is to catch it."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Ends what runs inside after so many seconds, a compilation, too."""

    def end(*_: object) -> None:
        raise Over

    before = signal.signal(signal.SIGALRM, end)
    # And each second after, should the first be lost in a callback that swallows exceptions.
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    except Over:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


Work = tuple[str, str, Callable[[], Iterator[Row]]]
"""Part, what it is of, and what measures it."""


def work_of(
    shapes: Sequence[ModelSpec], batches: Sequence[int], time_us: TimeUs, left: Callable[[str], float],
    device: torch.device,
) -> Iterator[Work]:  # fmt: skip
    """Everything there is to measure, what is short first."""
    for batch in batches:
        for shape in shapes:
            yield "argmax", f"{shape.name} x{batch}", partial(argmax_rows, shape, batch, time_us=time_us, device=device)
    for batch in batches:
        for shape in shapes:
            for product, count in products(shape).items():
                rows = partial(
                    product_rows, shape, product, count, batch, time_us=time_us, left=partial(left, "products"),
                    device=device,
                )  # fmt: skip
                yield "products", f"{shape.name} {product.part} x{batch}", rows
    # One shape after the other: what one batch has compiled serves the next.
    for shape in shapes:
        for config, count in states(shape).items():
            for batch in dict.fromkeys((*STATE_BATCHES, *(batch for batch in batches if batch > 1))):
                rows = partial(
                    state_rows, shape, config, count, batch, time_us=time_us, left=partial(left, "states"),
                    device=device,
                )  # fmt: skip
                yield "states", f"{shape.name} J {config.args} x{batch}", rows
    for shape in shapes:
        yield "steps", shape.name, partial(step_rows, shape, device)


def measure_all(works: Sequence[Work], seconds: float, left: Callable[[str], float]) -> list[Row]:
    """Prints each case when it is done, and names what the seconds did not suffice for."""
    rows: list[Row] = []
    out = {part: [name for kind, name, _ in works if kind == part] for part in PARTS}
    with limit(seconds):
        for part, name, build in works:
            if left(part) <= 0:
                continue
            began = len(rows)
            try:
                rows.extend(build())
                out[part].remove(name)
            except (torch.OutOfMemoryError, MachineError) as error:
                out[part].remove(name)
                print(f"{name}: left out: {str(error).splitlines()[0]}")
            finally:
                print(*(text for case in cases_of(rows[began:]) for text in lines(case)), sep="\n", flush=True)
            torch.cuda.empty_cache()
    for part, names in out.items():
        if names:
            print(f"{part}: the seconds did not suffice for {', '.join(names)}")
    return rows


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="jet-nemotron-2b,jet-nemotron-4b", help="model shapes")
    parser.add_argument("--batches", default="1,16,64,128", help="sequences of a step, 1 to 128")
    parser.add_argument("--seconds", type=float, default=60, help="it ends after this")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--out", type=Path, help="write every time as JSON")
    options = parser.parse_args(arguments)
    try:
        options.shapes = [resolve_shape(name) for name in options.shapes.split(",")]
        options.batches = [int(text) for text in options.batches.split(",")]
    except (UserError, ValueError) as error:
        parser.error(str(error))
    if not all(1 <= batch <= 128 for batch in options.batches):
        parser.error(f"bad --batches {options.batches}: write numbers from 1 to 128")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if gpu_missing():
        return 1
    import triton

    from nasbench.devices import detect
    from nasbench.profiling.timing import Budget, time_cuda

    began = time.monotonic()
    torch.manual_seed(0)
    info, budget = detect("cuda"), Budget(seconds=0.03, least=7, most=40)
    about = {
        "device": info.slug, "torch": torch.__version__, "triton": triton.__version__, "driver": info.driver,
        "measured_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
    print(f"{info.title}, torch {torch.__version__}, triton {triton.__version__}; * is what the kernels choose")

    def left(part: str) -> float:
        share = 1.0 if options.only else SHARES[part]
        return share * options.seconds - (time.monotonic() - began)

    with torch.inference_mode():
        works = work_of(
            options.shapes, options.batches, lambda calls: time_cuda(calls, budget, graph=True).p50_us, left,
            torch.device("cuda"),
        )  # fmt: skip
        rows = measure_all([work for work in works if options.only in (None, work[0])], left("steps") - 1, left)
    print(*sums(rows), f"{time.monotonic() - began:.0f} s", sep="\n")
    if options.out:
        told = [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows]
        options.out.write_text(json.dumps({**about, "rows": told}, indent=1) + "\n", encoding="utf-8")
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
