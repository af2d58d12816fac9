"""Launches of the large products and of the recurrent step, chosen by what they do to whole decode steps on this GPU.

    python benchmarks/step_launches.py --shape jet-nemotron-2b --batch 128 [--context 64k] [--seconds 120] [--jobs 8]
                                       [--out FILE.txt]

What is the faster launch alone (benchmarks/launches.py) need not be it in a step, where its start overlaps the launch
ahead and its end the next one's. So each candidate takes the place of the present choice in a captured step; one that
is ahead by more than KEEP is timed again between two of the present one, and kept if it is ahead there, too. Parts are
gone through one after another, and what was kept stays for those behind.

Each candidate is held against fp32 first, in --jobs processes at once, since compiling takes longest; one that is wrong
is not tried. The end says what was kept: `batch_launch`, `swiglu_launch`, `streams` and `step_launch` in
nasbench_kernels.decode are where to put it. Only numbers of one run compare: cards differ by more, and so does one card
cold and warm.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.kernel_cases import CLOSE, gpu_missing
from benchmarks.launch_cases import HEAD, Candidate, Product, ProductCase, candidates, products
from benchmarks.state_cases import StateCase, label, launches, states
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import NasbenchError, UserError
from nasbench.core.sizes import parse_size
from nasbench.model.mixers.gated_delta.spec import JetBlockSpec
from nasbench.model.shapes import ModelSpec

KEEP = 0.0015
"""Of a step's time: what a launch must save to be kept."""
REPLAYS = 13
DTYPE = torch.bfloat16
STATE = "recurrent step"


@dataclass
class Part:
    """Something that a step launches many times.

    Attributes:
        what: a Product, or STATE.
        tried: Candidates of a product, StepLaunches of a state; first what the kernels choose themselves.
        now: the one in place.
    """

    what: Product | str
    tried: list[Any]
    now: Any = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.tried[0]

    @property
    def title(self) -> str:
        if isinstance(self.what, str):
            return self.what
        return f"{self.what.part} {self.what.rows} x {self.what.columns}"


def told(choice: Any) -> str:
    """A Candidate or a StepLaunch in short."""
    return str(choice) if isinstance(choice, Candidate) else label(choice)


def parts_of(shape: ModelSpec, batch: int, device: torch.device) -> list[Part]:
    """The products that most layers have, and the recurrent step, each with what can be tried."""
    counts = products(shape)
    large = [product for product, count in counts.items() if product.part != HEAD and 2 * count >= shape.num_layers]
    found = [Part(product, candidates(product, batch, device, DTYPE)) for product in large]
    # cuBLAS with a kernel for SwiGLU behind it is not among what `in_place` can put there.
    for part in found:
        if isinstance(part.what, Product) and part.what.swiglu:
            part.tried = [choice for choice in part.tried if choice.kind != "cuBLAS" or choice.chosen]
    found += [Part(STATE, launches(config, batch, device)) for config in _state(shape)]
    return found


def _state(shape: ModelSpec) -> list[JetBlockSpec]:
    """The recurrent layers that a step has the most of: one choice is in place at a time."""
    return [config for config, _ in states(shape).most_common(1)]


def check(shape: str, batch: int, part: int, place: int) -> float:
    """Relative RMSE against fp32 of one candidate, in the measure of an output's; it is compiled by then. inf for what
    does not run."""
    device = torch.device("cuda")
    found = parts_of(resolve_shape(shape), batch, device)[part]
    choice = found.tried[place]
    try:
        with torch.inference_mode():
            if isinstance(found.what, Product):
                return ProductCase(found.what, batch, device, DTYPE, 2).error(choice)
            return StateCase(_state(resolve_shape(shape))[0], batch, device, DTYPE, 2).error(choice)
    except Exception:  # of what does not compile here, or does not fit
        return float("inf")


def checked(shape: str, batch: int, parts: Sequence[Part], jobs: int) -> list[str]:
    """Leaves out of every part what is wrong or does not run; a line for each of them. The first of a part must be
    right."""
    places = [(i, j) for i, part in enumerate(parts) for j in range(len(part.tried))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        errors = dict(
            zip(places, pool.map(check, *zip(*((shape, batch, *p) for p in places), strict=True)), strict=True)
        )
    bad = []
    for i, part in enumerate(parts):
        wrong = [j for j in range(len(part.tried)) if not errors[i, j] <= CLOSE["output"]]
        if 0 in wrong:
            raise UserError(f"{part.title}: what the kernels choose is wrong here, {errors[i, 0]:.1e} away")
        bad += [f"{part.title} {told(part.tried[j])}: left out, {errors[i, j]:.1e} away" for j in wrong]
        part.tried = [choice for j, choice in enumerate(part.tried) if j not in wrong]
    return bad


@contextmanager
def in_place(parts: Sequence[Part]) -> Iterator[None]:
    """The kernels' choices are those of `parts`, as they are when a step is captured."""
    from nasbench_kernels import decode
    from nasbench_kernels.decode import product, recurrent

    ours = {(p.what.rows, p.what.columns): p for p in parts if isinstance(p.what, Product)}
    gate_up = {p.what.rows // 2: p for p in parts if isinstance(p.what, Product) and p.what.swiglu}
    step = [part for part in parts if part.what == STATE]
    batch_launch, swiglu_launch, streams = product.batch_launch, product.swiglu_launch, decode.streams

    def of(rows: int, columns: int) -> Any:
        return ours[rows, columns].now.launch if (rows, columns) in ours else None

    def batch(count: int, rows: int, columns: int, *rest: Any) -> Any:
        return of(rows, columns) or batch_launch(count, rows, columns, *rest)

    def swiglu(count: int, outputs: int, *rest: Any) -> Any:
        return gate_up[outputs].now.launch if outputs in gate_up else swiglu_launch(count, outputs, *rest)

    def streamed(x: torch.Tensor, weight: torch.Tensor, divided: bool = False) -> bool:
        part = ours.get((weight.shape[0], weight.shape[1]))
        return streams(x, weight, divided) if part is None else part.now.kind == "product"

    new: list[tuple[Any, str, Any]] = [
        (product, "batch_launch", batch), (product, "swiglu_launch", swiglu), (decode, "streams", streamed),
    ]  # fmt: skip
    if step:
        new.append((recurrent, "step_launch", lambda *_: step[0].now))
    old = [(module, name, getattr(module, name)) for module, name, _ in new]
    try:
        for module, name, stand_in in new:
            setattr(module, name, stand_in)
        yield
    finally:
        for module, name, own in old:
            setattr(module, name, own)


def climb(
    parts: Sequence[Part], ms: Callable[[], float], left: Callable[[], float], say: Callable[[str], None]
) -> float:
    """Goes through all parts once, and returns the milliseconds of a step at the end.

    Args:
        ms: of a step as the parts now are.
        left: seconds.
    """
    now = ms()
    for part in parts:
        say(f"{part.title}: {told(part.now)}")
        now = ms()
        for choice in part.tried:
            if choice == part.now:
                continue
            if left() <= 0:
                say("the seconds are over")
                return now
            before, part.now = part.now, choice
            found = ms()
            kept = found < now * (1 - KEEP)
            if kept:
                part.now = before
                now = ms()
                part.now = choice
                found = max(found, ms())
                kept = found < now * (1 - KEEP)
            say(f"    {told(choice):26s} {found:8.3f} ms, before {now:8.3f}{'  kept' if kept else ''}")
            if kept:
                now = found
            else:
                part.now = before
    return ms()


def stepper(shape: ModelSpec, batch: int, context: int, device: torch.device) -> Callable[[], float]:
    """Milliseconds of a captured step, the median of REPLAYS, of random weights and a full cache."""
    from nasbench.runtime.fused_step import FusedStep

    from nasbench.checkpoints.load import random_decoder
    from nasbench.model import fused
    from nasbench.runtime.clock import stopwatch
    from nasbench.runtime.graph import capture

    decoder = random_decoder(shape, shape.placement, dtype=DTYPE, device=device)
    cache = decoder.new_cache(batch, context)
    cache.fill_random(context - 1, torch.Generator(device).manual_seed(0))
    decoder.sequence_meta(0, context)  # makes the rotary tables: a graph must not
    tokens = torch.randint(shape.vocab_size, (batch,), device=device)
    positions = torch.full_like(tokens, context - 1)
    step, clock = FusedStep(decoder, cache, context), stopwatch(device)

    def work() -> None:
        tokens.copy_(fused.most_likely(step(tokens, positions)))

    def ms() -> float:
        graph = capture(work)
        graph.replay()
        return 1e3 * sorted(clock(graph.replay) for _ in range(REPLAYS))[REPLAYS // 2]

    return ms


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="jet-nemotron-2b", help="model shape")
    parser.add_argument("--batch", type=int, default=128, help="sequences of a step, 2 to 128")
    parser.add_argument("--context", default="64k", help="keys that a step looks at")
    parser.add_argument("--seconds", type=float, default=120, help="it ends after this")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile and check")
    parser.add_argument("--out", type=Path, help="write what is printed to this file, too")
    options = parser.parse_args(arguments)
    try:
        options.model, options.tokens = resolve_shape(options.shape), parse_size(options.context)
    except UserError as error:
        parser.error(str(error))
    if not 2 <= options.batch <= 128:
        parser.error(f"bad --batch {options.batch}: choose 2 to 128")
    if options.jobs < 1:
        parser.error(f"bad --jobs {options.jobs}: at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if gpu_missing():
        return 1
    import triton

    from nasbench.devices import detect
    from nasbench.runtime.memory import free_bytes
    from nasbench.runtime.roofline import decode_floor, measure_ceilings

    began, device = time.monotonic(), torch.device("cuda")
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    shape, batch = options.model, options.batch
    say(f"{detect('cuda').title}, torch {torch.__version__}, triton {triton.__version__}: {shape.name}, "
        f"{options.context} x {batch}")  # fmt: skip
    try:
        parts = parts_of(shape, batch, device)
        for line in checked(options.shape, batch, parts, options.jobs):
            say(line)
        ceilings = measure_ceilings(device, free_bytes(device), DTYPE)
        floor = sum(part.ms for part in decode_floor(shape, shape.placement, batch, options.tokens, 2, ceilings))
        with torch.inference_mode(), in_place(parts):
            ms = stepper(shape, batch, options.tokens, device)
            first = ms()
            say(f"as the kernels choose: {first:.3f} ms, {floor / first:.3f} of the floor, {floor:.3f} ms")
            last = climb(parts, ms, lambda: options.seconds - (time.monotonic() - began), say)
    except NasbenchError as error:
        print(f"step_launches.py: {error}", file=sys.stderr)
        return error.exit_code
    say(f"at the end: {last:.3f} ms, {floor / last:.3f} of the floor")
    for part in parts:
        say(f"    {part.title}: {told(part.now)}{'' if part.now == part.tried[0] else ', not what the kernels choose'}")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
