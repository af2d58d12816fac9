"""nasbench search-dims: dimensions of a recurrent layer that cost alike, measured and trained alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.cli.common import AsJson, Device, DryRun, Dtype, Model
from nasbench.core.errors import MachineError, UserError
from nasbench.core.sizes import format_size, parse_size, parse_sizes

if TYPE_CHECKING:
    import pandas

    from nasbench.cost.end_to_end import EndToEnd
    from nasbench.model.shapes import ModelSpec
    from nasbench.search.dims import DimSpace

PAPER = "table2"


def command(
    train: Annotated[
        list[str] | None,
        typer.Argument(help="Behind --: options of select-block, which then trains and scores every block."),
    ] = None,
    blocks: Annotated[
        str,
        typer.Option(help="A kind, as J or J@12x96x256: a grid around it. Several names: these. table2: the paper's."),
    ] = "J",
    model: Model = "default",
    out: Annotated[Path, typer.Option(help="Folder of speeds, runs and the table.")] = Path("runs/dims"),
    same: Annotated[str, typer.Option(help="What stays, of a layer: cache, parameters or latency.")] = "cache",
    tolerance: Annotated[float, typer.Option(help="How far that may be off, as a share.")] = 0.02,
    heads: Annotated[str, typer.Option(help="Heads, as 4,8,12; default: thirds of the kind's own.")] = "",
    key_dims: Annotated[str, typer.Option(help="Key dimensions.")] = "64,96,128,192,256",
    value_dims: Annotated[str, typer.Option(help="Value dimensions; default: the one that costs alike.")] = "",
    conv_sizes: Annotated[str, typer.Option(help="Tokens of the convolution; default: the kind's own.")] = "",
    trials: Annotated[int, typer.Option(help="Blocks of the grid that Optuna chooses; 0: all.")] = 0,
    full_attention: Annotated[
        int,
        typer.Option("--full-attention", "-k", help="Evenly spread A layers, in models without the kind."),
    ] = 4,
    context: Annotated[str, typer.Option(help="Context of cache and decode steps.")] = "4k",
    batch: Annotated[int, typer.Option(help="Sequences that decode at once.")] = 1,
    prompt: Annotated[str, typer.Option(help="Tokens of one prompt, 0 for none; default: the context.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds after which no speed is measured any more; 0: none.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Choose heads, key, value and convolution sizes at a constant cache, size or speed (PostNAS stage 4).

    Speeds are of whole models with random weights. Stopped at any moment, the same command continues.
    """
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import choose_dtype, log, parse_kinds, print_json, print_table, torch_device
    from nasbench.cli.main import parse
    from nasbench.core.dtypes import dtype_bytes
    from nasbench.cost import check_context
    from nasbench.report.blocks import markdown_cells
    from nasbench.report.dims import DIMS, TABLE_2
    from nasbench.search.dims import DimSpace, name_of

    if batch < 1 or trials < 0 or limit < 0:
        raise UserError(f"bad batch {batch}, trials {trials} or limit {limit:g}: a batch is 1 or more, none is below 0")
    shape, where = resolve_shape(model), torch_device(device)
    named = parse_kinds(" ".join(TABLE_2) if blocks == PAPER else blocks, shape)[1:]
    tokens = check_context(shape, parse_size(context))
    read = 0 if prompt == "0" else check_context(shape, parse_size(prompt or context))
    dtype = choose_dtype(dtype, where)
    sizes = [tuple(parse_sizes(text)) for text in (heads, key_dims, value_dims, conv_sizes)]
    space = DimSpace(shape.mixer(named[0]), same, tolerance, tokens, batch, dtype_bytes(dtype), *sizes)
    names = [name_of(shape.mixer(name)) for name in named]
    grid = len(names) == 1
    if grid:
        names = list(dict.fromkeys([*names, *space.names()]))
    if len(names) == 1:
        raise UserError(f"no other block has the {same} of {names[0]} within {tolerance:.1%}: widen the grid")
    work = _Work(shape, model, space, full_attention, read, out, where, dtype, train or [], limit, seed)
    if train:
        parse(work.training(names))
    table = work.table(names)
    if not dry_run:
        out.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            names = work.choose(names, trials) if grid and trials else work.measure(names)
        table = work.table(names)
    found: dict[str, Any] = {"out": str(out), "kinds": table.to_dict("records")}
    if not dry_run:
        files, found["notes"] = work.write(table)
        found["files"] = [str(path) for path in files]
        log("wrote " + ", ".join(found["files"]))
    if as_json:
        print_json(found)
        return
    print_table(*markdown_cells(table.drop(columns=list(DIMS))), work.title)  # their names say them
    print("\n".join(found.get("notes", ())))


@dataclass
class _Work:
    """Measures and trains blocks; every result is in a file of the folder, and what is there is not made again."""

    shape: ModelSpec
    model: str
    space: DimSpace
    full_attention: int
    prompt: int
    out: Path
    device: str
    dtype: str
    extra: list[str]
    limit: float
    seed: int

    def __post_init__(self) -> None:
        self.path, self.scores = self.out / "speeds.csv", self.out / "blocks.csv"
        self.began = time.monotonic()

    @property
    def title(self) -> str:
        where = f"{format_size(self.space.context)} x {self.space.batch}, {self.dtype}"
        return f"{self.shape.name}, one layer's {self.space.same} as that of {self.reference}; {where}"

    @property
    def reference(self) -> str:
        from nasbench.search.dims import name_of

        return name_of(self.space.reference)

    @cached_property
    def whole(self) -> EndToEnd:
        from nasbench.cli.common import torch_dtype
        from nasbench.cost.end_to_end import EndToEnd

        return EndToEnd(self.shape, self.device, torch_dtype(self.dtype))

    def speeds(self, names: Sequence[str]) -> None:
        """Decode steps of every block, then prompts: a command that is cut has the steps."""
        from nasbench.cli.common import log
        from nasbench.cost.end_to_end import measure_missing
        from nasbench.cost.holdout import WholePoint
        from nasbench.search.dims import placement_of

        placements = [placement_of(self.shape, name, self.full_attention) for name in names]
        points = [WholePoint("decode", each, self.space.context, self.space.batch) for each in placements]
        points += [WholePoint("prefill", each, self.prompt, 1) for each in placements if self.prompt]
        measure_missing(
            self.whole, points, self.path, log,
            allows=lambda _: not self.limit or time.monotonic() < self.began + self.limit,
        )  # fmt: skip

    def kept(self, names: Sequence[str]) -> list[str]:
        """Those that are measured, where latency stays within the tolerance of the reference's."""
        rows = self.table(names).to_dict("records")
        step = {row["kind"]: row["step ms"] for row in rows if row.get("step ms", 0) > 0}
        own = step.get(self.reference)
        if not step or (own is None and self.space.same == "latency"):
            raise MachineError(f"no step of {self.reference} or another block was measured: too large, or no time left")
        if own and self.space.same == "latency":
            return [name for name, ms in step.items() if abs(ms / own - 1) <= self.space.tolerance]
        return list(step)

    def measure(self, names: Sequence[str]) -> list[str]:
        """Speeds of all, then scores of those that keep to the constraint, which it returns."""
        self.speeds(names)
        names = self.kept(names)
        self.train(names)
        return names

    def choose(self, names: Sequence[str], trials: int) -> list[str]:
        """As `measure`, for blocks that Optuna chooses by loss (without training: more parameters) and tokens/s."""
        from nasbench.report.blocks import LOSS, SPEED
        from nasbench.report.dims import PARAMETERS

        known = self.measure([self.reference])

        def evaluate(name: str) -> tuple[float, float] | None:
            self.speeds([name])
            if name not in self.kept([self.reference, name]):
                return None
            known[:] = dict.fromkeys([*known, name])
            self.train(known)
            row = self.table(known).set_index("kind").loc[name].to_dict()
            return float(row[LOSS] if self.extra else -row[PARAMETERS]), float(row[SPEED])

        goal, journal = LOSS if self.extra else PARAMETERS, self.out / "optuna.journal"
        chosen = self.space.optimise(goal, min(trials, len(names)), self.seed, journal, evaluate)
        return self.measure(list(dict.fromkeys([self.reference, *chosen])))

    def training(self, names: Sequence[str]) -> list[str]:
        """The command that trains and scores them."""
        words = ["select-block", "--blocks", " ".join(names), "--model", self.model, "--out", str(self.out)]
        words += ["-k", str(self.full_attention), "--context", str(self.space.context), "--seed", str(self.seed)]
        words += ["--batch", str(self.space.batch), "--device", self.device, "--dtype", self.dtype, "--no-speeds"]
        return [*words, *self.extra]

    def train(self, names: Sequence[str]) -> None:
        from nasbench.cli.main import run

        if self.extra and names:
            with redirect_stdout(sys.stderr):
                if code := run(self.training(names)):
                    raise typer.Exit(code)

    def table(self, names: Sequence[str]) -> pandas.DataFrame:
        """One row a block, with what is known so far."""
        from nasbench.cost.calibration import read_calibration
        from nasbench.report.dims import dims_table

        target = self.space.context, self.space.batch
        rows = read_calibration(self.path)
        return dims_table(
            names, self.shape, self.full_attention, target, self.space.dtype_bytes, rows,
            self.scores if self.extra else None,
        )  # fmt: skip

    def write(self, table: pandas.DataFrame) -> tuple[list[Path], list[str]]:
        """(the files of the table, its sentences)."""
        from nasbench.report.blocks import LOSS, SPEED, write_block_table
        from nasbench.report.dims import PARAMETERS, spreads

        notes = spreads(table)
        y, axis = (LOSS, "held-out loss, nats a token") if LOSS in table else (PARAMETERS, "parameters, millions")
        under = "".join(f"\n- {note}" for note in notes) + "\n"
        files = write_block_table(table, self.out, self.title, "dims", (f"{SPEED}, measured", axis), y, under)
        return files, notes
