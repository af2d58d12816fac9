"""The matrix products that benchmarks/launches.py times: which a step has, the ways to compute each, inputs, check."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernel_cases import Call, relative_rmse, sets_of
from nasbench.backbone.shapes import ModelShape

INPUTS, GENERATOR, OUTPUTS, GATE_UP, DOWN, HEAD = "inputs", "generator", "outputs", "gate+up", "down", "head"
BEFORE: dict[str, Literal["norm", "silu"]] = {INPUTS: "norm", GATE_UP: "norm", HEAD: "norm", GENERATOR: "silu"}
EPS = 1e-6
BLOCKS = ((2, 512, 4), (2, 1024, 4), (2, 2048, 4), (4, 512, 4), (4, 512, 8), (8, 512, 8))
NARROW, NARROW_BLOCKS = 512, ((4, 4), (8, 4), (8, 8), (16, 4), (16, 8), (32, 8))
"""Up to so many columns one block holds a row: rows and warps."""


@dataclass(frozen=True)
class Product:
    """A weight [rows, columns]; of gate and up together, gate first."""

    part: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def divided(self) -> bool:
        """Only ever added to the residual stream."""
        return self.part in (OUTPUTS, DOWN)

    @property
    def swiglu(self) -> bool:
        return self.part == GATE_UP

    @property
    def before(self) -> Literal["", "norm", "silu"]:
        """What is done to the input within a product for one sequence."""
        return BEFORE.get(self.part, "")


def products(shape: ModelShape) -> Counter[Product]:
    """The matrix products of a decode step and how often each occurs. Layers without a fused step do their own."""

    def of(part: str, linear: nn.Linear) -> Product:
        return Product(part, linear.out_features, linear.in_features, linear.bias is not None)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    found: Counter[Product] = Counter()
    for name, layers in Counter(shape.placement).items():
        with torch.device("meta"):
            mixer: Any = shape.mixer(name).build()
        if hasattr(mixer, "fused_mix"):
            found[replace(of(INPUTS, mixer.stacked.linears[0]), rows=sum(mixer.stacked.sizes))] += layers
            found[of(OUTPUTS, mixer.o_proj)] += layers
        if hasattr(mixer, "dynamic_conv1d"):
            found[of(GENERATOR, mixer.dynamic_conv1d.kernel_generator.w2)] += layers
    found[Product(GATE_UP, 2 * inner, hidden)] = found[Product(DOWN, hidden, inner)] = shape.num_layers
    found[Product(HEAD, shape.vocab_size, hidden)] = 1
    return found


@dataclass(frozen=True)
class Candidate:
    """One way to compute a product.

    Attributes:
        kind: gemv, product or cuBLAS.
        launch: (rows, columns of a block, warps) for gemv, a ProductLaunch, or None.
        chosen: what a decode step runs.
    """

    kind: str
    launch: Any = None
    chosen: bool = False

    def __str__(self) -> str:
        if self.launch is None:
            return self.kind
        if self.kind == "gemv":
            return "{}x{}w{}".format(*self.launch)
        it = self.launch
        return f"{it.rows}x{it.columns}w{it.warps}s{it.stages}p{it.parts}e{it.early}"


def candidates(product: Product, batch: int, device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """Ways to compute a product, the chosen one first."""
    from nasbench_kernels.decode import fits, streams
    from nasbench_kernels.decode.card import card
    from nasbench_kernels.decode.gemv import gemv_launch
    from nasbench_kernels.decode.product import batch_launch, product_launch

    rows, columns, width = product.rows, product.columns, dtype.itemsize
    if batch == 1:
        chosen = gemv_launch(rows // 2 if product.swiglu else rows, columns, product.swiglu)
        whole = 1 << (columns - 1).bit_length()
        blocks = [(n, whole, warps) for n, warps in NARROW_BLOCKS] if columns <= NARROW else BLOCKS
        return [Candidate("gemv", launch, launch == chosen) for launch in dict.fromkeys([chosen, *blocks])]
    x, weight = torch.empty(batch, columns, device="meta", dtype=dtype), torch.empty(rows, columns, device="meta")
    if product.swiglu:
        base, ours = product_launch(batch, width, card(device)[1]), fits(x)
    else:
        base = batch_launch(batch, rows, columns, width, *card(device), product.divided)
        ours = streams(x, weight, product.divided)
    tried = [Candidate("product", launch, ours and launch == base) for launch in tiles(base, columns, product.divided)]
    return sorted([*tried, Candidate("cuBLAS", chosen=not ours)], key=lambda candidate: not candidate.chosen)


def tiles(base: Any, columns: int, divided: bool) -> list[Any]:
    """`base` and launches that differ from it in a thing or two."""
    late, early = replace(base, early=0), replace(base, early=base.stages)
    found = [base, late, early, replace(base, warps=12 - base.warps), replace(late, rows=128, warps=8)]
    for stages in (max(1, base.stages - 1), base.stages + 1):
        found.append(replace(base, stages=stages, early=stages if base.early else 0))
    if divided:
        blocks = -(-columns // base.columns)
        for wanted in (base.parts // 2, base.parts * 2 // 3, base.parts * 3 // 2, base.parts * 2):
            share = -(-blocks // min(blocks, max(1, wanted)))
            found += [replace(one, parts=-(-blocks // share)) for one in (late, early)]
    return list(dict.fromkeys(found))


class ProductCase:
    """Inputs of a product in memory, its check, and its calls.

    Args:
        sets: copies of the weight; default enough to exceed the L2 cache.
    """

    def __init__(
        self, product: Product, batch: int, device: torch.device, dtype: torch.dtype, sets: int | None = None
    ) -> None:
        def draw(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        self.product, self.batch = product, batch
        self.nbytes = product.rows * product.columns * dtype.itemsize
        sets = sets or max(2, sets_of(self.nbytes))
        self.weights = [draw(product.rows, product.columns).mul_(product.columns**-0.5) for _ in range(sets)]
        self.bias = draw(product.rows) if product.bias else None
        self.x, self.residual = draw(batch, product.columns), draw(batch, product.rows)
        self.norm_weight, self.next_norm = draw(product.columns), draw(product.rows)

    def run(self, candidate: Candidate, weight: Tensor, residual: Tensor) -> Tensor:
        """What the product alone gives: [B, N], or its parts [S, B, N]; one sequence's is added to the residual."""
        from nasbench_kernels import decode
        from nasbench_kernels.decode.product import launch_batch_product, launch_swiglu_product

        product, x = self.product, self.x
        if candidate.kind == "gemv":
            return decode.gemv(
                x, weight, self.bias, before=product.before, norm_weight=self.norm_weight, eps=EPS,
                swiglu=product.swiglu, add_to=residual if product.divided else None, launch=candidate.launch,
            )  # fmt: skip
        if candidate.kind == "cuBLAS":
            result = F.linear(x, weight, self.bias)
            return decode.swiglu(result) if product.swiglu else result
        if product.swiglu:
            return launch_swiglu_product(x, weight, candidate.launch)
        return launch_batch_product(x, weight, self.bias, product.divided, candidate.launch)

    def call(self, candidate: Candidate, weight: Tensor) -> Tensor:
        """The product and, where its parts are still to be added up, what does that."""
        from nasbench_kernels.decode import add_norm

        result = self.run(candidate, weight, self.residual)
        if self.product.divided and self.batch > 1:
            return add_norm(self.residual, result, self.next_norm, EPS)
        return result

    def calls(self, candidate: Candidate) -> list[Call]:
        return [partial(self.call, candidate, weight) for weight in self.weights]

    def error(self, candidate: Candidate) -> float:
        """Relative RMSE against fp32, on inputs drawn anew: what another launch left in the memory is not taken for an
        output."""
        self.x.normal_()
        residual = torch.randn_like(self.residual)
        wanted = self.exact() + (residual.float() if self.batch == 1 and self.product.divided else 0)
        result = self.run(candidate, self.weights[0], residual)
        return relative_rmse(result.sum(0) if result.dim() > 2 else result, wanted)

    def exact(self) -> Tensor:
        x = self.x.float()
        before = self.product.before if self.batch == 1 else ""
        if before == "norm":
            x = F.rms_norm(x, x.shape[1:], self.norm_weight.float(), EPS)
        x = F.silu(x) if before == "silu" else x
        y = F.linear(x, self.weights[0].float(), None if self.bias is None else self.bias.float())
        if not self.product.swiglu:
            return y
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up
