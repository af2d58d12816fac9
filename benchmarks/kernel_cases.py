"""What benchmarks/kernels.py times: inputs, the check of a kernel on them against its naive form, the calls."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from nasbench_kernels.dynamic_conv import naive_dynamic_conv
from nasbench_kernels.gated_delta import naive_gated_delta
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], object]
PROMPTS, CHECKED_PROMPTS = (8, 4096), (2, 208)
"""Sequences and tokens: of the timed rule, and of its check, whose last chunk is not full."""
BEYOND_CACHE = 200e6
"""Bytes that the buffer sets of a measurement exceed together: four times the L2 cache of an H100."""
LEAST_CALLS = 16
"""Of short kernels in a graph: what lies between two replays counts little."""
CLOSE = {"output": 1e-2, "state": 1e-4, "history": 1e-6, "final state": 2e-2, "gradient": 3e-2}
"""Relative RMSE allowed, in bf16 but for the recurrent step's state, which is fp32."""


def relative_rmse(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-300))


def worst(errors: list[float]) -> float:
    """The largest, or NaN if there is one: max() may drop it."""
    return float(torch.tensor(errors).max())


def gpu_missing() -> bool:
    """Whether there is no GPU to measure, which it then says."""
    if torch.cuda.is_available():
        return False
    print("no CUDA GPU here: this benchmark measures one", file=sys.stderr)
    return True


def sets_of(nbytes: float) -> int:
    """Sets of buffers of this size that exceed the cache together."""
    return max(1, math.ceil(BEYOND_CACHE / nbytes))


def each_us(time_us: Callable[[Sequence[Call]], float], calls: Sequence[Call]) -> float:
    """Microseconds of a call, from `time_us` of all of them together, or of several rounds of them."""
    rounds = -(-LEAST_CALLS // len(calls)) if len(calls) > 1 else 1
    return time_us([*calls] * rounds) / (len(calls) * rounds)


def pass_tb_s(
    time_us: Callable[[Sequence[Call]], float], nbytes: int, device: torch.device | str, in_place: bool,
    sets: int | None = None,
) -> float:  # fmt: skip
    """10^12 bytes per second of a plain pass over fp32 buffers of `nbytes`: reading, or in place with reads and writes
    counted."""
    buffers = [torch.randn(nbytes // 4, device=device) for _ in range(sets or sets_of(nbytes))]
    calls = [partial(x.mul_, -1.0) if in_place else partial(torch.sum, x) for x in buffers]
    return (2 if in_place else 1) * nbytes / each_us(time_us, calls) / 1e6


class Work(ABC):
    """Inputs in memory, the check on them, and the calls to time."""

    nbytes: int
    beside: int = 0
    """Bytes that a call moves besides those it is measured by."""

    @abstractmethod
    def errors(self) -> dict[str, float]:
        """Relative RMSE against the naive form; names are those of CLOSE, or begin with one and go on in brackets."""

    @abstractmethod
    def calls(self) -> list[Call]:
        """One call per set of buffers."""


class RecurrentStep(Work):
    """JetBlock's step of `batch` sequences between the projections; the state is what its traffic consists of."""

    def __init__(
        self, batch: int, device: str = "cuda", heads: int = 12, key_dim: int = 96, value_dim: int = 256,
        dtype: torch.dtype = torch.bfloat16, sets: int | None = None,
    ) -> None:  # fmt: skip
        from nasbench_kernels.decode import RowLayout, StepWorkspace

        keys, values = heads * key_dim, heads * value_dim
        sizes = (keys, keys, values, values, values // 8, heads, heads)  # q, k, v, gate, generator, decay, beta
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.layout = RowLayout(*(starts[i] for i in (0, 1, 2, 3, 5, 6)))
        self.nbytes = 2 * batch * keys * value_dim * 4
        # Queries, keys, values, gate, decay and beta; taps; the convolution's past, read and written; outputs.
        elements = (2 * keys + 2 * values + 2 * heads) + 4 * values + 2 * 3 * values + values
        self.beside = batch * dtype.itemsize * elements
        self.a_log, self.dt_bias = torch.randn(heads, device=device), torch.randn(heads, device=device)
        self.norm_weight = torch.randn(value_dim, device=device).to(dtype)
        self.workspace = StepWorkspace()

        def draw(*size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, device=device, dtype=kind)

        self.sets = [
            (
                draw(batch, sum(sizes)),
                draw(batch, values, 4),
                draw(batch, 3, values),
                draw(batch, heads, key_dim, value_dim, kind=torch.float32),
            )
            for _ in range(sets or sets_of(self.nbytes / 2))
        ]

    def step(self, row: Tensor, kernels: Tensor, history: Tensor, state: Tensor) -> Tensor:
        from nasbench_kernels.decode import recurrent_step

        return recurrent_step(
            row, self.layout, state, self.a_log, self.dt_bias, self.norm_weight, self.workspace, kernels, history
        )

    def calls(self) -> list[Call]:
        return [partial(self.step, *tensors) for tensors in self.sets]

    def errors(self) -> dict[str, float]:
        """Of two steps: the second finds what the first left."""
        row, kernels, history, state = self.sets[0]
        exact_state, exact_history = state.clone(), history.float().clone()
        found: dict[str, list[float]] = {"output": [], "state": [], "history": []}
        for _ in range(2):
            output = self.step(row, kernels, history, state)
            exact, exact_state, exact_history = self.naive(row.float(), kernels, exact_history, exact_state)
            pairs = {"output": (output, exact), "state": (state, exact_state), "history": (history, exact_history)}
            for name, pair in pairs.items():
                found[name].append(relative_rmse(*pair))
        return {name: worst(errors) for name, errors in found.items()}

    def naive(self, row: Tensor, kernels: Tensor, history: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output [B, H * V], state, history) of the naive forms in fp32, arXiv 2508.15884 and kernels' README."""
        _, heads, key_dim, value_dim = state.shape
        at = self.layout

        def part(start: int, size: int) -> Tensor:
            return row[:, start : start + heads * size].unflatten(1, (heads, size))

        new = part(at.v, value_dim).flatten(1)[:, None]
        v = naive_dynamic_conv(new, kernels.float()[:, None], history).unflatten(2, (heads, value_dim))
        q, k = (F.silu(part(start, key_dim)) for start in (at.q, at.k))
        q, k = ((x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt())[:, None] for x in (q, k))
        g = -self.a_log.exp() * F.softplus(part(at.decay, 1)[..., 0] + self.dt_bias)
        beta = part(at.beta, 1)[..., 0].sigmoid()
        mixed, state = naive_gated_delta(q, k, v, g[:, None], beta[:, None], state)
        normed = F.rms_norm(mixed[:, 0], (value_dim,), self.norm_weight.float(), 1e-5)
        return (normed * F.silu(part(at.gate, value_dim))).flatten(1), state, torch.cat((history[:, 1:], new), 1)


class Attention(Work):
    """One query per sequence over keys and values [B, Hkv, N, D].

    Args:
        mixed: every sequence has its own length, from half the slots to all; else all are full.
        form: who computes it: "ours", or how SDPA is asked: "enable_gqa", or "rows", the query heads of a group as
            rows of one product.
    """

    def __init__(
        self, batch: int, slots: int, heads: int, kv_heads: int, mixed: bool = False, form: str = "ours",
        device: str = "cuda", dim: int = 128, dtype: torch.dtype = torch.bfloat16, sets: int | None = None,
    ) -> None:  # fmt: skip
        self.form, self.slots = form, slots
        lengths = torch.linspace(slots / 2, slots, batch).long() if mixed else torch.full((batch,), slots)
        self.positions = lengths.to(device) - 1
        one = 2 * kv_heads * dim * dtype.itemsize
        self.nbytes = int(lengths.sum()) * one
        self.sets = [
            (
                torch.randn(batch, heads, dim, device=device, dtype=dtype),
                *(torch.randn(batch, kv_heads, slots, dim, device=device, dtype=dtype) for _ in range(2)),
            )
            for _ in range(sets or sets_of(batch * slots * one))
        ]

    def mix(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> Tensor:
        """-> [B, H, D]."""
        if self.form == "ours":
            from nasbench_kernels.decode import decode_attention

            return decode_attention(q, keys, values, self.positions if positions is None else positions, self.slots)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            if self.form == "rows":
                rows = q.unflatten(1, (keys.shape[1], -1))
                return F.scaled_dot_product_attention(rows, keys, values).flatten(1, 2)
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    def calls(self) -> list[Call]:
        return [partial(self.mix, *tensors) for tensors in self.sets]

    def errors(self) -> dict[str, float]:
        """Of some sequences, ours with very short ones among them."""
        q, keys, values = self.sets[0]
        positions = self.positions.clone()
        if self.form == "ours":
            for row, length in enumerate((1, 65, 64)[: len(positions) - 1]):
                positions[row] = min(length, self.slots) - 1
        output = self.mix(q, keys, values, positions)
        looked_at = sorted({*range(min(4, len(positions))), len(positions) // 2, len(positions) - 1})
        errors = []
        for b in looked_at:  # each by itself: the mix of many values is small beside that of a few
            seen = (x[b, :, : int(positions[b]) + 1] for x in (keys, values))
            errors.append(relative_rmse(output[b], self.naive(q[b], *seen)))
        return {"output": worst(errors)}

    @staticmethod
    def naive(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One sequence in fp32: q [H, D], keys and values [Hkv, L, D] -> [H, D]."""
        grouped = q.float().unflatten(0, (keys.shape[0], -1))
        scores = torch.einsum("hgd,hnd->hgn", grouped, keys.float()) * q.shape[-1] ** -0.5
        return torch.einsum("hgn,hnd->hgd", scores.softmax(-1), values.float()).flatten(0, 1)


class Rule(Work):
    """The chunked gated delta rule over prompts from an empty state.

    Args:
        library: "ours" or "fla".
        backward: with all gradients.
    """

    def __init__(
        self, library: str, backward: bool, device: str = "cuda", heads: int = 12, key_dim: int = 96,
        value_dim: int = 256, dtype: torch.dtype = torch.bfloat16, timed: tuple[int, int] = PROMPTS,
        checked: tuple[int, int] = CHECKED_PROMPTS,
    ) -> None:  # fmt: skip
        self.library, self.backward, self.device, self.dtype = library, backward, device, dtype
        self.sizes, self.timed, self.checked = (heads, key_dim, value_dim), timed, checked
        rows = timed[0] * timed[1] * heads
        given, made = rows * ((2 * key_dim + value_dim) * dtype.itemsize + 8), rows * value_dim * dtype.itemsize
        # The backward reads what the forward was given and the output's gradient, and writes theirs.
        self.nbytes = given + made + (2 * given + made if backward else 0)
        if library == "ours":
            from nasbench_kernels.prefill import triton_gated_delta

            self.rule: Callable[..., Any] = triton_gated_delta
        else:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            self.rule = partial(chunk_gated_delta_rule, output_final_state=True)

    def draw(self, batch: int, tokens: int) -> list[Tensor]:
        """q, k, v, g, beta and a gradient of the output."""
        heads, key_dim, value_dim = self.sizes

        def normal(size: int) -> Tensor:
            return torch.randn(batch, tokens, heads, size, device=self.device)

        q, k = (F.normalize(normal(key_dim), dim=-1).to(self.dtype) for _ in range(2))
        v, dout = (normal(value_dim).to(self.dtype) for _ in range(2))
        g, beta = (
            -0.1 * torch.rand_like(q[..., 0], dtype=torch.float32),
            torch.rand_like(q[..., 0], dtype=torch.float32),
        )
        leaves = [tensor.requires_grad_(self.backward) for tensor in (q, k, v, g, beta)]
        return [*leaves, dout]

    def run(self, rule: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
        """Output, final state, and the gradients where there are any."""
        *leaves, dout = tensors
        output, state = rule(*leaves)
        gradients = torch.autograd.grad(output, leaves, dout.to(output.dtype)) if self.backward else ()
        return [output, state, *gradients]

    def calls(self) -> list[Call]:
        return [partial(self.run, self.rule, *self.draw(*self.timed))]

    def errors(self) -> dict[str, float]:
        tensors = self.draw(*self.checked)
        exact = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]
        names = ["output", "final state", *(f"gradient ({name})" for name in ("q", "k", "v", "g", "beta"))]
        pairs = zip(self.run(self.rule, *tensors), self.run(naive_gated_delta, *exact), strict=True)
        return {name: relative_rmse(*pair) for name, pair in zip(names, pairs, strict=False)}
