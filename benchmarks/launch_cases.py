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
from nasbench.model.shapes import ModelSpec

INPUTS, GENERATOR, OUTPUTS, GATE_UP, DOWN, HEAD = "inputs", "generator", "outputs", "gate+up", "down", "head"
BEFORE: dict[str, Literal["norm", "silu"]] = {INPUTS: "norm", GATE_UP: "norm", HEAD: "norm", GENERATOR: "silu"}
EPS = 1e-6
MIXERS = ((2, 512, 4), (2, 1024, 4), (2, 2048, 4), (4, 512, 4), (4, 512, 8), (8, 512, 8))
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


def products(shape: ModelSpec) -> Counter[Product]:
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
        rows = f"t{it.rows}" * it.turned or f"{it.rows}"
        rows += f"+{it.more}" * bool(it.more) + f"/{it.taken}" * bool(it.taken)
        return f"{rows}x{it.columns}w{it.warps}s{it.stages}p{it.parts}e{it.early}" + "h" * it.hints


def candidates(product: Product, batch: int, device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """Ways to compute a product, the chosen one first."""
    from nasbench_kernels.decode import fits, streams
    from nasbench_kernels.decode.card import card
    from nasbench_kernels.decode.gemv import gemv_launch
    from nasbench_kernels.decode.product_launch import batch_launch, swiglu_launch

    rows, columns, width = product.rows, product.columns, dtype.itemsize
    if batch == 1:
        chosen = gemv_launch(rows // 2 if product.swiglu else rows, columns, product.swiglu)
        whole = 1 << (columns - 1).bit_length()
        blocks = [(n, whole, warps) for n, warps in NARROW_BLOCKS] if columns <= NARROW else MIXERS
        return [Candidate("gemv", launch, launch == chosen) for launch in dict.fromkeys([chosen, *blocks])]
    x, weight = torch.empty(batch, columns, device="meta", dtype=dtype), torch.empty(rows, columns, device="meta")
    if product.swiglu:
        base, ours = swiglu_launch(batch, rows // 2, width, *card(device)), fits(x)
    else:
        base = batch_launch(batch, rows, columns, width, *card(device), product.divided)
        ours = streams(x, weight, product.divided)
    if product.divided:
        found = divided_tiles(base, rows, columns, width, *card(device))
    else:
        found = whole_tiles(base, batch, rows // 2 if product.swiglu else rows, width, *card(device), product.swiglu)
    tried = [Candidate("product", launch, ours and launch == base) for launch in found]
    return sorted([*tried, Candidate("cuBLAS", chosen=not ours)], key=lambda candidate: not candidate.chosen)


def divided_tiles(base: Any, rows: int, columns: int, element_size: int, sms: int, shared_memory: int) -> list[Any]:
    """`base` and launches of a divided product that differ from it in a thing or two."""
    blocks = -(-columns // base.columns)

    def divided(launch: Any, parts: int) -> Any:
        share = -(-blocks // min(blocks, max(1, parts)))
        return replace(launch, parts=-(-blocks // share))

    plain = base
    if base.turned:
        plain = replace(base, warps=4, stages=4, turned=False)
        plain = divided(plain, min(sms // -(-rows // base.rows), blocks // 12))
    late, early = replace(plain, early=0), replace(plain, early=plain.stages)
    found = [base, late, early]
    for parts in (plain.parts // 2, plain.parts * 2 // 3, 2 * plain.parts):
        found += [divided(late, parts), divided(early, parts)]
    # Blocks of 128 rows read x half as often; one of them for each multiprocessor.
    found.append(divided(replace(late, rows=128, warps=8), sms // -(-rows // 128)))
    found += [divided(late, plain.parts * 3 // 2), replace(plain, warps=12 - plain.warps)]
    # Turned, as many rows at a time and as many stages as fit.
    for wide in (128, 64):
        turned = replace(plain, rows=wide, warps=8 if base.sequences == 128 else 4, turned=True)
        fit = (shared_memory - 2048) // stage_bytes(turned, element_size, False)
        turned = divided(replace(turned, stages=max(1, min(6, fit)), early=4), sms // -(-rows // wide))
        found += [turned, replace(turned, early=0)]
    for stages in (max(1, plain.stages - 1), plain.stages + 1):
        found.append(replace(plain, stages=stages, early=stages if plain.early else 0))
    return list(dict.fromkeys(found))


def whole_tiles(
    base: Any, batch: int, outputs: int, element_size: int, sms: int, shared_memory: int, swiglu: bool
) -> list[Any]:
    """`base` and other launches of a product that is not divided, what promises most first."""
    from nasbench_kernels.decode.product_launch import ProductLaunch, turned_launch

    def staged(launch: Any, programs: int, most: int) -> Any:
        """In as many stages as leave room for so many programs on a multiprocessor."""
        fit = (shared_memory // programs - 2048) // stage_bytes(launch, element_size, swiglu)
        return replace(launch, stages=max(1, min(most, fit)))

    def wide(launch: Any, programs: int, most: int) -> Any:
        """Two lines of the cache of each row at once, so that fewer pages of the memory are opened."""
        return staged(replace(launch, columns=2 * launch.columns, early=(launch.early + 1) // 2), programs, most)

    even = partial(turned_launch, batch, outputs, element_size, sms, shared_memory, swiglu=swiglu)
    one, two = even(), even(each=2)
    # Blocks of 64 rows, few enough stages for three programs to a multiprocessor: all 280 or 344 of gate and up of the
    # 2B and 4B models run at once on an H100.
    block = staged(ProductLaunch(64, base.sequences, one.columns, one.warps, 1, turned=True), 3, 4)
    if base.turned:
        plain = staged(ProductLaunch(64, base.sequences, one.columns, one.warps, 1), 2, 3 if swiglu else 5)
        plain = replace(plain, early=plain.stages)
    else:
        plain = base
    other = replace(plain, early=0 if plain.early else plain.stages)
    found = [base, plain, one, staged(one, 1, 8)]
    if (wider := wide(one, 1, 4)).stages > 2:  # elsewhere little is on its way at once, and some spill their registers
        found.append(wider)
    if swiglu:
        found += [replace(block, early=block.stages), block, two, replace(one, early=0)]
        found += [replace(block, rows=128, warps=8, early=block.stages), replace(one, hints=True), other]
    else:
        narrow = staged(replace(block, rows=32, warps=4, early=4), 3, 6)
        found += [two, even(each=2, most=128), wide(plain, 2, 4), staged(plain, 1, 6), replace(one, early=0)]
        found += [narrow, replace(one, hints=True), other, replace(plain, early=0, rows=128, warps=8)]
    return list(dict.fromkeys(found))


def stage_bytes(launch: Any, element_size: int, swiglu: bool) -> int:
    """Of shared memory, for one stage."""
    rows = launch.rows + launch.more if launch.turned else launch.rows * (2 if swiglu else 1)
    return (rows + launch.sequences) * launch.columns * element_size


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
