"""Speed of single kernels on this GPU, beside what its memory does in the same run and beside other implementations.

    python benchmarks/kernels.py [--out FILE.json] [--seconds 40] [--only PART]

Parts: the recurrent step of the 2B shape; attention of one new token over a static cache, beside SDPA by cuDNN; the
chunked gated delta rule, forward and with its backward, beside fla-core where that is installed. Times are medians of
CUDA-graph replays over sets of buffers that together exceed the L2 cache.

Before a speed stands a check against the naive form on random inputs, for the first two on the very inputs that are
timed: while it is red, no speed is shown and the exit code is 1. Other implementations are checked, too; theirs that
fail are refused or left out with a word, which costs us nothing. fla tunes itself when it is first called: it comes
last, and is left out where --seconds are over by then.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.kernel_cases import (
    CLOSE,
    PROMPTS,
    Attention,
    Call,
    RecurrentStep,
    Rule,
    Work,
    each_us,
    gpu_missing,
    pass_tb_s,
)
from nasbench.core.sizes import format_size
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import BUFFER_BYTES

RECURRENT, ATTENTION, RULE = "recurrent step", "decode attention", "gated delta rule"
BATCHES = (1, 64, 128, 256, 512, 1024)
CACHES = ((128, 65536, 12, 2), (1024, 4096, 12, 2), (1, 65536, 12, 2), (18, 65536, 16, 8))
"""Sequences, slots, query heads and key/value heads of 128 channels."""


@dataclass(frozen=True)
class Figure:
    """One line of the table; NaN is a number that there is not.

    Attributes:
        us: median microseconds of a call.
        nbytes: least bytes that a call moves: of the recurrent step, its states' alone.
        beside: what else it moves.
        same_tb_s, large_tb_s: what a plain pass over buffers of this size, and over the largest, reached in this run:
            in place for the recurrent step, reading for attention.
        status: ok, refused (with the reason), or left out (with the reason).
        errors: relative RMSE by what was compared.
    """

    part: str
    case: str
    implementation: str
    ours: bool
    us: float
    nbytes: int
    beside: int
    tb_s: float
    same_tb_s: float
    large_tb_s: float
    fraction: float
    status: str
    errors: dict[str, float]


@dataclass(frozen=True)
class Case:
    part: str
    name: str
    implementation: str
    build: Callable[[], Work]
    ours: bool = True


def cases() -> Iterator[Case]:
    for batch in BATCHES:
        yield Case(RECURRENT, f"batch {batch}", "ours", partial(RecurrentStep, batch))
    for batch, slots, heads, kv_heads in CACHES:
        name = f"{heads}/{kv_heads} heads, {batch} x {format_size(slots)}"
        yield Case(ATTENTION, name, "ours", partial(Attention, batch, slots, heads, kv_heads))
        for form in ("enable_gqa", "rows"):
            build = partial(Attention, batch, slots, heads, kv_heads, False, form)
            yield Case(ATTENTION, name, f"SDPA cuDNN, {form}", build, False)
        if batch > 1:
            build = partial(Attention, batch, slots, heads, kv_heads, True)
            yield Case(ATTENTION, f"{name}, half to full", "ours", build)
    for library in ("ours", "fla"):
        for backward in (False, True):
            name = f"{PROMPTS[0]} x {format_size(PROMPTS[1])}, forward{' and backward' if backward else ''}"
            yield Case(RULE, name, library, partial(Rule, library, backward), library == "ours")


def red(errors: dict[str, float]) -> dict[str, float]:
    """Those that are not close; a NaN is not."""
    return {name: error for name, error in errors.items() if not error < CLOSE[name.partition(" (")[0]]}


class Judge:
    """Checks cases, times those that are green, and knows what plain passes over memory take.

    Args:
        time_us: microseconds of all calls together.
        device: "cuda".
    """

    def __init__(self, time_us: Callable[[Sequence[Call]], float], device: str = "cuda") -> None:
        self.time_us, self.device = time_us, device
        largest = min(BUFFER_BYTES[device], free_bytes(device) // 8)
        self.large = {RECURRENT: self.pass_tb_s(largest, True), ATTENTION: self.pass_tb_s(largest, False)}

    def pass_tb_s(self, nbytes: int, in_place: bool) -> float:
        return pass_tb_s(self.time_us, nbytes, self.device, in_place)

    def __call__(self, case: Case) -> Figure:
        errors: dict[str, float] = {}
        us, nbytes, beside, same = math.nan, 0, 0, math.nan
        try:
            work = case.build()
            errors, nbytes, beside = work.errors(), work.nbytes, work.beside
            if wrong := red(errors):
                told = ", ".join(f"{name} is {error:.1e} away" for name, error in wrong.items())
                status = f"refused: {told} from the naive form"
            else:
                us, status = each_us(self.time_us, work.calls()), "ok"
                del work
                same = self.pass_tb_s(nbytes // 2, True) if case.part == RECURRENT else math.nan
        except torch.OutOfMemoryError:
            status = "left out: does not fit in the memory"
        except Exception as error:  # a kernel that does not compile is as red as one that is wrong
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            status = f"{'refused' if case.ours else 'left out'}: {first}"
        tb_s, large = nbytes / us / 1e6, self.large.get(case.part, math.nan)
        return Figure(
            case.part, case.name, case.implementation, case.ours, us, nbytes, beside, tb_s, same, large,
            tb_s / (large if math.isnan(same) else same), status, errors,
        )  # fmt: skip


def line(figure: Figure) -> str:
    head = f"{figure.part:17s} {figure.case:34s} {figure.implementation:22s}"
    if figure.status != "ok":
        return f"{head} {figure.status}"
    text = f"{head} {figure.us:10.1f} us {figure.tb_s:7.3f} TB/s"
    if not math.isnan(figure.same_tb_s):
        text += f"  {figure.fraction:.2f} of {figure.same_tb_s:.2f} in place at this size,"
        text += f" {figure.tb_s / figure.large_tb_s:.2f} of {figure.large_tb_s:.2f}"
        if figure.beside:
            text += f"; with all that it moves {figure.fraction * (1 + figure.beside / figure.nbytes):.2f}"
    elif not math.isnan(figure.large_tb_s):
        text += f"  {figure.fraction:.2f} of {figure.large_tb_s:.2f} read"
    return text


def beside(figures: Sequence[Figure]) -> list[str]:
    """How many times faster ours is than the fastest other implementation of each case."""
    lines = []
    for ours in figures:
        others = [f for f in figures if (f.part, f.case) == (ours.part, ours.case) and not f.ours and f.status == "ok"]
        if ours.ours and ours.status == "ok" and others:
            best = min(others, key=lambda figure: figure.us)
            lines.append(f"{ours.part}, {ours.case}: {best.us / ours.us:.2f} times as fast as {best.implementation}")
    return lines


def exit_code(figures: Sequence[Figure]) -> int:
    return int(any(figure.ours and figure.status.startswith("refused") for figure in figures))


def _known(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every line as JSON")
    parser.add_argument("--only", choices=(RECURRENT, ATTENTION, RULE), help="one part")
    parser.add_argument("--seconds", type=float, default=40, help="other libraries are left out after this")
    options = parser.parse_args(arguments)
    if gpu_missing():
        return 1
    # In the script's own folder this file is what others take for the package named `kernels`.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    import triton

    from nasbench.devices import detect
    from nasbench.runtime.timing import Budget, time_cuda

    began = time.monotonic()
    torch.manual_seed(0)
    budget = Budget(seconds=0.15, least=15, most=40)
    judge = Judge(lambda calls: time_cuda(calls, budget, graph=True).p50_us)
    info = detect("cuda")
    about = {
        "device": info.slug, "torch": torch.__version__, "triton": triton.__version__, "driver": info.driver,
        "measured_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "in_place_tb_s": judge.large[RECURRENT], "read_tb_s": judge.large[ATTENTION],
    }  # fmt: skip
    print(
        f"{info.title}, torch {torch.__version__}, triton {triton.__version__}: in place "
        f"{judge.large[RECURRENT]:.2f} TB/s, read {judge.large[ATTENTION]:.2f}"
    )
    figures: list[Figure] = []
    for case in cases():
        if options.only and case.part != options.only:
            continue
        if case.implementation == "fla" and time.monotonic() - began > options.seconds:
            print(f"{case.part:17s} {case.name:34s} {case.implementation:22s} left out: {options.seconds:g} s are over")
            continue
        figures.append(judge(case))
        torch.cuda.empty_cache()
        print(line(figures[-1]), flush=True)
    print(*beside(figures), f"{time.monotonic() - began:.0f} s", sep="\n")
    if options.out:
        rows = [{name: _known(value) for name, value in asdict(figure).items()} for figure in figures]
        options.out.write_text(json.dumps({**about, "figures": rows}, indent=1) + "\n", encoding="utf-8")
    return exit_code(figures)


if __name__ == "__main__":
    sys.exit(main())
