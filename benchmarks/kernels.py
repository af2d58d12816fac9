"""Speed of single kernels on this GPU, beside its memory's speed in the same run and beside other libraries.

    python benchmarks/kernels.py [--out FILE.json] [--seconds 40] [--only PART]

Parts: the recurrent decode step of the 2B shape; decode attention, beside SDPA by cuDNN; the chunked gated delta rule,
forward and backward, beside fla-core where it is installed. Times are medians of CUDA-graph replays over buffers that
exceed the L2 cache together. A kernel that differs from its naive form has no speed; if it is ours, the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import need_gpu, parser_of, provenance, relative_rmse, run, sets_of, worst, write_json
from nasbench.core.sizes import format_size
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import measure_ceilings

Call = Callable[[], object]
TimeUs = Callable[[Sequence[Call]], float]
RECURRENT, ATTENTION, RULE = PARTS = ("recurrent step", "decode attention", "gated delta rule")
BATCHES = (1, 64, 128, 256, 512, 1024)
CACHES = ((128, 65536, 12, 2), (1024, 4096, 12, 2), (1, 65536, 12, 2), (18, 65536, 16, 8))
"""Sequences, slots, query heads and key/value heads of 128 channels."""
PROMPTS, CHECKED_PROMPTS = (8, 4096), (2, 208)
"""Sequences and tokens of the timed rule, and of its check, whose last chunk is not full."""
LEAST_CALLS = 16
"""Of short kernels in a graph, so that what lies between two replays counts little."""
CLOSE = {"output": 1e-2, "state": 1e-4, "conv state": 1e-6, "final state": 2e-2, "gradient": 3e-2}
"""Relative RMSE allowed, in bf16 except for the recurrent step's fp32 state."""


@dataclass
class Work:
    """A call for each set of buffers, the check (relative RMSE by name), and the bytes that a call must move; of the
    recurrent step those of the state."""

    calls: list[Call]
    errors: Callable[[], dict[str, float]]
    nbytes: int


@dataclass
class Case:
    """A line of the table; NaN is a number that there is not.

    Attributes:
        us: median microseconds of a call.
        pass_tb_s: of a plain pass over large buffers, in place for the recurrent step and reading for attention;
            the kernel reaches `fraction` of it.
        status: ok, refused or left out, with the reason.
    """

    part: str
    name: str
    implementation: str
    build: Callable[[], Work] = field(repr=False)
    us: float = math.nan
    nbytes: int = 0
    tb_s: float = math.nan
    pass_tb_s: float = math.nan
    fraction: float = math.nan
    status: str = ""
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.implementation == "ours"


def recurrent(
    batch: int, device: str = "cuda", heads: int = 12, key_dim: int = 96, value_dim: int = 256,
    dtype: torch.dtype = torch.bfloat16,
) -> Work:  # fmt: skip
    """JetBlock's decode step between the projections; its traffic is nearly all state."""
    from nasbench_kernels.gated_delta.decode import StepWorkspace, recurrent_step
    from nasbench_kernels.gated_delta.naive import RowLayout, naive_recurrent_step

    keys, values = heads * key_dim, heads * value_dim
    sizes = (keys, keys, values, values, values // 8, heads, heads)  # q, k, v, gate, generator, decay, beta
    layout = RowLayout(*(sum(sizes[:i]) for i in (0, 1, 2, 3, 5, 6)))
    draw = partial(torch.randn, device=device)
    weights = draw(heads), draw(heads), draw(value_dim, dtype=dtype)
    workspace, nbytes = StepWorkspace(), 2 * batch * keys * value_dim * 4
    sets = [
        (*(draw(batch, *size, dtype=dtype) for size in ((sum(sizes),), (values, 4), (3, values))),
         draw(batch, heads, key_dim, value_dim))
        for _ in range(sets_of(nbytes / 2))
    ]  # fmt: skip

    def step(row: Tensor, taps: Tensor, conv_state: Tensor, state: Tensor) -> Tensor:
        return recurrent_step(row, layout, state, *weights, workspace, taps, conv_state)

    def errors() -> dict[str, float]:
        """Of two steps: the second one reads what the first one wrote."""
        row, taps, conv_state, state = sets[0]
        found: dict[str, list[float]] = {"output": [], "state": [], "conv state": []}
        exact: tuple[Any, Any, Any] = (None, state.clone(), conv_state.clone())
        for _ in range(2):
            output = step(row, taps, conv_state, state)
            exact = naive_recurrent_step(row, layout, exact[1], *weights, taps, exact[2])
            for name, pair in zip(found, zip((output, state, conv_state), exact, strict=True), strict=True):
                found[name].append(relative_rmse(*pair))
        return {name: worst(several) for name, several in found.items()}

    return Work([partial(step, *tensors) for tensors in sets], errors, nbytes)


def attention(
    batch: int, slots: int, heads: int, kv_heads: int, mixed: bool = False, form: str = "ours", device: str = "cuda",
    dim: int = 128, dtype: torch.dtype = torch.bfloat16,
) -> Work:  # fmt: skip
    """One query per sequence over full caches, or with `mixed` over half full to full ones.

    Args:
        form: "ours", or how SDPA is called: "enable_gqa", or "rows", a group's query heads as rows of one product.
    """
    from nasbench_kernels.attention.decode import decode_attention
    from nasbench_kernels.attention.naive import naive_decode_attention

    lengths = torch.linspace(slots / 2, slots, batch).long() if mixed else torch.full((batch,), slots)
    everywhere, one = lengths.to(device) - 1, 2 * kv_heads * dim * dtype.itemsize
    draw = partial(torch.randn, device=device, dtype=dtype)
    sets = [
        (draw(batch, heads, dim), draw(batch, kv_heads, slots, dim), draw(batch, kv_heads, slots, dim))
        for _ in range(sets_of(batch * slots * one))
    ]

    def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor = everywhere) -> Tensor:
        if form == "ours":
            return decode_attention(q, keys, values, positions, slots)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            if form == "rows":
                rows = q.unflatten(1, (kv_heads, -1))
                return F.scaled_dot_product_attention(rows, keys, values).flatten(1, 2)
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    def errors() -> dict[str, float]:
        """Of some sequences, each by itself; ours also with very short ones."""
        positions = everywhere.clone()
        if form == "ours":
            for row, length in enumerate((1, 65, 64)[: batch - 1]):
                positions[row] = min(length, slots) - 1
        output = attend(*sets[0], positions)
        some = sorted({*range(min(4, batch)), batch // 2, batch - 1})
        exact = (naive_decode_attention(*(x[b : b + 1] for x in (*sets[0], positions))) for b in some)
        return {"output": worst([relative_rmse(output[b], wanted[0]) for b, wanted in zip(some, exact, strict=True)])}

    return Work([partial(attend, *tensors) for tensors in sets], errors, int(lengths.sum()) * one)


def rule(
    library: str, backward: bool, device: str = "cuda", heads: int = 12, key_dim: int = 96, value_dim: int = 256,
    dtype: torch.dtype = torch.bfloat16, timed: tuple[int, int] = PROMPTS, checked: tuple[int, int] = CHECKED_PROMPTS,
) -> Work:  # fmt: skip
    """The chunked gated delta rule over prompts from an empty state; with `backward` all gradients, too."""
    from nasbench_kernels.gated_delta import naive_gated_delta

    if library == "ours":
        from nasbench_kernels.gated_delta.prefill import triton_gated_delta as fast
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        fast = partial(chunk_gated_delta_rule, output_final_state=True)

    def draw(batch: int, tokens: int) -> list[Tensor]:
        """q, k, v, g, beta and a gradient of the output."""
        normal = partial(torch.randn, batch, tokens, heads, device=device)
        q, k = (F.normalize(normal(key_dim), dim=-1).to(dtype) for _ in range(2))
        g, beta = -0.1 * torch.rand_like(normal()), torch.rand_like(normal())
        leaves = [x.requires_grad_(backward) for x in (q, k, normal(value_dim).to(dtype), g, beta)]
        return [*leaves, normal(value_dim).to(dtype)]

    def outcome(form: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
        """Output, final state, and the gradients where there are any."""
        *leaves, dout = tensors
        output, state = form(*leaves)
        return [output, state, *(torch.autograd.grad(output, leaves, dout.to(output.dtype)) if backward else ())]

    def errors() -> dict[str, float]:
        tensors = draw(*checked)
        exact = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]
        names = ["output", "final state", *(f"gradient ({name})" for name in ("q", "k", "v", "g", "beta"))]
        pairs = zip(outcome(fast, *tensors), outcome(naive_gated_delta, *exact), strict=True)
        return {name: relative_rmse(*pair) for name, pair in zip(names, pairs, strict=False)}

    rows = timed[0] * timed[1] * heads
    given, made = rows * ((2 * key_dim + value_dim) * dtype.itemsize + 8), rows * value_dim * dtype.itemsize
    # The backward reads the inputs and the output's gradient, and writes the inputs' gradients.
    nbytes = given + made + (2 * given + made if backward else 0)
    return Work([partial(outcome, fast, *draw(*timed))], errors, nbytes)


def cases() -> Iterator[Case]:
    for batch in BATCHES:
        yield Case(RECURRENT, f"batch {batch}", "ours", partial(recurrent, batch))
    for batch, slots, heads, kv_heads in CACHES:
        name, sizes = f"{heads}/{kv_heads} heads, {batch} x {format_size(slots)}", (batch, slots, heads, kv_heads)
        yield Case(ATTENTION, name, "ours", partial(attention, *sizes))
        for form in ("enable_gqa", "rows"):
            yield Case(ATTENTION, name, f"SDPA cuDNN, {form}", partial(attention, *sizes, form=form))
        if batch > 1:
            yield Case(ATTENTION, f"{name}, half to full", "ours", partial(attention, *sizes, mixed=True))
    for library in ("ours", "fla"):
        for backward in (False, True):
            name = f"{PROMPTS[0]} x {format_size(PROMPTS[1])}, forward{' and backward' if backward else ''}"
            yield Case(RULE, name, library, partial(rule, library, backward))


def wrong(errors: dict[str, float]) -> dict[str, float]:
    """The errors that are too large; a NaN is."""
    return {name: error for name, error in errors.items() if not error < CLOSE[name.partition(" (")[0]]}


def each_us(time_us: TimeUs, calls: Sequence[Call]) -> float:
    """Microseconds of a call, from `time_us` of all of them together, or of several rounds of them."""
    rounds = -(-LEAST_CALLS // len(calls)) if len(calls) > 1 else 1
    return time_us([*calls] * rounds) / (len(calls) * rounds)


def measure(case: Case, time_us: TimeUs, rates: dict[str, float]) -> None:
    """Checks a case and times it if it is right."""
    try:
        work = case.build()
        case.errors, case.nbytes = work.errors(), work.nbytes
        if bad := wrong(case.errors):
            found = ", ".join(f"{name} is {error:.1e} away" for name, error in bad.items())
            case.status = f"refused: {found} from the naive form"
            return
        case.us, case.status = each_us(time_us, work.calls), "ok"
        del work
    except torch.OutOfMemoryError:
        case.status = "left out: does not fit in the memory"
        return
    except Exception as error:  # a kernel that does not compile is as bad as one that is wrong
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        case.status = f"{'refused' if case.ours else 'left out'}: {first}"
        return
    case.tb_s, case.pass_tb_s = case.nbytes / case.us / 1e6, rates.get(case.part, math.nan)
    case.fraction = case.tb_s / case.pass_tb_s


def line(case: Case) -> str:
    head = f"{case.part:17s} {case.name:34s} {case.implementation:22s}"
    if case.status != "ok":
        return f"{head} {case.status}"
    text = f"{head} {case.us:10.1f} us {case.tb_s:7.3f} TB/s"
    return text if math.isnan(case.pass_tb_s) else f"{text}  {case.fraction:.2f} of {case.pass_tb_s:.2f}"


def work(options: argparse.Namespace) -> int:
    need_gpu()
    from nasbench.runtime.timing import Budget, time_cuda

    began, budget = time.monotonic(), Budget(seconds=0.15, least=15, most=40)
    torch.manual_seed(0)

    def time_us(calls: Sequence[Call]) -> float:
        return time_cuda(calls, budget, graph=True).p50_us

    ceilings = measure_ceilings("cuda", free_bytes("cuda"), torch.bfloat16)
    rates = {RECURRENT: ceilings.in_place_gb_s / 1e3, ATTENTION: ceilings.read_gb_s / 1e3}
    about = {**provenance(), **asdict(ceilings)}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    done: list[Case] = []
    for case in cases():
        if options.only and case.part != options.only:
            continue
        if case.implementation == "fla" and time.monotonic() - began > options.seconds:
            case.status = f"left out: {options.seconds:g} s are over"
        else:
            measure(case, time_us, rates)
        done.append(case)
        torch.cuda.empty_cache()
        print(line(case), flush=True)
    rows = [{name: value for name, value in asdict(case).items() if name != "build"} for case in done]
    write_json(options.out, {**about, "figures": rows})
    return int(any(case.ours and case.status.startswith("refused") for case in done))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--seconds", type=float, default=40, help="other libraries are left out after this")
    return run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
