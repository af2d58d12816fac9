"""nasbench from Python: what `import nasbench as nb` offers. Functions return dataclasses and pandas DataFrames.

    nb.models()  nb.devices()  nb.read_profiles("nvidia-h200")
    nb.cost("14J A 4J A 2W 6J", "jet-nemotron-2b", "64k", 128, profile="nvidia-h200")
    nb.search("runs/mine", full_attention=(4, 8), context="8k", batch=4)
    nb.trials("runs/mine")  nb.front("runs/mine")  nb.scores("runs/mine")  nb.validation("runs/mine")
    nb.recommend("runs/mine")  nb.report("runs/mine")
    nb.plot.front("runs/mine")

Stages that train or measure a device stay commands: profile, distill, finalize, validate. They take minutes to hours,
and continue after a stop. `nb.cost`, `nb.devices`, `nb.report` and `nb.search` are also packages; calling one calls the
function here.

Wrong input raises `nasbench.core.errors.UserError`, a failing machine `MachineError`; both are `NasbenchError`. A size
is a number or a text, as "64k". A run is its folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size

if TYPE_CHECKING:
    import pandas as pd

    from nasbench.cost import Cost, CostModel
    from nasbench.report.verdict import Verdict
    from nasbench.search.run_folder import Outcome
    from nasbench.search.session import Progress
    from nasbench.store import Row

Size = int | str
Folder = str | Path


def _frame(rows: Iterable[Any]) -> pd.DataFrame:
    """One row a dataclass; without rows a frame without columns."""
    import pandas as pd

    return pd.DataFrame([vars(row) for row in rows])


def _size(value: Size) -> int:
    return value if isinstance(value, int) else parse_size(value)


def _db(db: Folder | None) -> Path | None:
    return None if db is None else Path(db)


def models() -> pd.DataFrame:
    """The built-in model shapes, indexed by name: family, layers, sizes, context in tokens, parameters, placement."""
    from nasbench.model.shapes import MODELS
    from nasbench.spaces.placement import format_placement

    table = _frame(MODELS[name] for name in MODELS).set_index("name")
    table["parameters"] = [MODELS[name].parameters() for name in table.index]
    table["placement"] = [format_placement(MODELS[name].placement) for name in table.index]
    return table


def devices() -> pd.DataFrame:
    """The known devices with their data-sheet figures, indexed by slug."""
    from nasbench.devices import DEVICES

    return _frame(DEVICES[name] for name in DEVICES).set_index("slug")


def read_profiles(device: str = "", db: Folder | None = None) -> pd.DataFrame:
    """Profile rows, one measurement a row, times in microseconds; docs/database.md explains the columns.

    Args:
        device: its slug, as "nvidia-h200"; "" for all devices that have rows.
        db: folder or file of databases; None for the shipped and the user's.

    Raises UserError for a device without rows and for a bad file.
    """
    from nasbench.cost import find_profiles, profiled_devices

    names = [device] if device else profiled_devices(_db(db))
    return _frame(row for name in names for row in find_profiles(name, _db(db)))


def cost_model(model: str, profile: str = "", dtype: str = "", db: Folder | None = None) -> CostModel:
    """The cost model of a device for a model. One without rows knows memory, and no speed.

    Args:
        model: built-in name, folder, GGUF file, hub name or "default".
        profile: the device's slug; "" for this machine.
        dtype: fp32, bf16 or fp16; "" for what was profiled, bf16 where that says nothing.

    Raises UserError for an unknown model or device.
    """
    return profiled_model(model, profile, dtype, db)[0]


def profiled_model(model: str, profile: str, dtype: str, db: Folder | None) -> tuple[CostModel, list[Row]]:
    """`cost_model`, and the rows of its device, none where nobody measured it."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cost import CostModel, find_profiles, load_cost_model, profiled_devices
    from nasbench.devices import DEVICES, detect
    from nasbench.store import block_cells, select

    shape, place = resolve_shape(model), _db(db)
    slug = profile or detect("auto").slug
    known = slug in profiled_devices(place) or (profile and profile not in DEVICES)
    rows = find_profiles(slug, place) if known else []
    dtypes = {row.dtype for row in select(rows, **block_cells(shape, "head"))}
    dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else "bf16")
    return load_cost_model(slug, shape, dtype, place) if rows else CostModel([], shape, dtype, device=slug), rows


def cost(
    placement: str,
    model: str,
    context: Size,
    batch: Size = 1,
    *,
    profile: str = "",
    dtype: str = "",
    db: Folder | None = None,
    extrapolate: bool = False,
) -> Cost:
    """Decode and prefill speed (tokens/s of all sequences together), step (ms), cache and memory (bytes), fit.

    Args:
        placement: one letter a layer, as "14J A 4J A 2W 6J".
        extrapolate: allow points outside of the measured ones.

    Returns:
        A `Cost`; speeds are None where rows are missing or it does not fit; `source` says of what class they are.

    Raises UserError for a placement, context, batch, model or device that is not legal.
    """
    costs = cost_model(model, profile, dtype, db)
    layers, tokens, sequences = costs.shape.parse(placement), _size(context), _size(batch)
    found = costs.cache(layers, tokens, sequences)
    if found.fits is not False:
        with contextlib.suppress(UserError):  # no rows for a speed
            found = costs.cost(layers, tokens, sequences, extrapolate)
    return found


def search(
    run: Folder,
    strategy: str = "beam",
    *,
    objective: str = "kl",
    most: Sequence[str] = (),
    least: Sequence[str] = (),
    profile: str = "",
    context: Size = "",
    batch: Size = "",
    dtype: str = "",
    eval_dtype: str = "",
    search_tokens: Size = "2k",
    test_tokens: Size = "4k",
    measure_finalists: int = 0,
    device: str = "cpu",
    db: Folder | None = None,
    progress: Progress = lambda what, done, total: None,
    **options: Any,
) -> Outcome:
    """Ranks placements of a distilled run; adds to trials.csv and writes front.csv. The same call goes on.

    Args:
        objective: a task, a weighted sum as "kl+0.5*retrieval-kl@2k:64", or a cost as "decode_tok_s@h200,64k,max".
        most, least: limits, as "cache=64MiB@64k" and "decode_tok_s=8000@h200,64k,max"; tasks may be limited, too.
        profile, context, batch, dtype, db: what to be fast on; "" and None for those of the run's last search, in the
            first one this device at the largest context and batch that were profiled.
        eval_dtype: fp32 or bf16, in which the supernet is scored on the torch device `device`; "" as it was trained.
        search_tokens, test_tokens: held-out tokens that score, and others for what was found (0: none).
        measure_finalists: how many of the best placements are measured end to end, beside what was predicted
            (validation.csv).
        options: fields of nasbench.search.session.Options: full_attention=(4, 8), evaluations=120, seed=0, ...

    Returns:
        An `Outcome`: `comparisons`, the best and the evenly spread placement of each K, and `front`.

    Raises UserError before anything is loaded for unknown strategies, objectives, options and points without rows.
    """
    from nasbench.core.dtypes import torch_dtype
    from nasbench.core.files import sole_writer
    from nasbench.devices import detect
    from nasbench.search.inputs import SearchInputs
    from nasbench.search.run_folder import search_run
    from nasbench.search.run_target import remember_target
    from nasbench.supernet.trained import run_dtype

    asked = SearchInputs.of(
        Path(run), strategy, objective=objective, most=most, least=least, profile=profile, context=str(context),
        batch=str(batch), dtype=dtype, search_tokens=str(search_tokens), test_tokens=str(test_tokens), device=device,
        db=_db(db), **options,
    )  # fmt: skip
    opened, chosen = asked.run, asked.options
    kind = torch_dtype(run_dtype(opened.path, eval_dtype, device))
    if measure_finalists < 0:
        raise UserError(f"bad --measure-finalists {measure_finalists}: choose 0 or more")
    if measure_finalists and asked.target.device != (here := detect(device).slug):
        raise UserError(f"--measure-finalists measures on {here}: search for it, not for {asked.target.device}")

    from nasbench.evaluation.evaluator import Evaluator
    from nasbench.search.validation import validate

    with contextlib.nullcontext() if chosen.worker else sole_writer(opened.path / "search", "searches"):
        evaluator = Evaluator.open(
            opened, device=device, dtype=kind, search_tokens=asked.search_tokens, test_tokens=asked.test_tokens
        )
        remember_target(opened, asked.target, asked.db)
        outcome = search_run(
            opened, evaluator, asked.costs, asked.target, asked.strategy, chosen, objective=objective,
            test=asked.test_tokens is not None, db=asked.db, progress=progress,
        )  # fmt: skip
        del evaluator  # its memory is for the models that are measured
        chosen_few = outcome.finalists(measure_finalists)
        bar = lambda done, total: progress("finalists", done, total)  # noqa: E731
        if not chosen_few:
            return outcome
        shape = asked.costs.shape
        rows = validate(opened, chosen_few, asked.target, asked.costs, shape, device, progress=bar)
        return replace(outcome, measured=rows)


def trials(run: Folder) -> pd.DataFrame:
    """Every placement that searches tried, in order: loss and KL in nats a token, decode_tok_s, cache_bytes, ..."""
    from nasbench.runs import Run
    from nasbench.search.trials import read_trials

    return _frame(read_trials(Run.open(Path(run)).trials))


def front(run: Folder) -> pd.DataFrame:
    """The Pareto front of every target, rank 1 the most accurate."""
    from nasbench.runs import Run
    from nasbench.search.trials import read_front

    return _frame(read_front(Run.open(Path(run)).front))


def scores(run: Folder) -> pd.DataFrame:
    """Every score: weights, placement, task, settings, dtype, value, stderr, n."""
    from nasbench.evaluation.scores import ScoreStore
    from nasbench.runs import Run

    return ScoreStore(Run.open(Path(run)).scores).table()


def validation(run: Folder) -> pd.DataFrame:
    """Predicted and measured decode tokens/s of whole models; `error` is predicted / measured - 1."""
    from nasbench.runs import Run
    from nasbench.search.validation import read_validation

    return _frame(read_validation(Run.open(Path(run)).validation))


def recommend(run: Folder, budget: float | None = None, *, db: Folder | None = None) -> Verdict | None:
    """The verdict of the report: `point`, `sentences`, `commands`, `cautions`; None without a searched hybrid.

    Args:
        budget: what the placement may cost above the model: nats a token where the objective is loss or KL. None for
            5 % of perplexity.
    """
    from nasbench.report.facts import collect
    from nasbench.report.targets import recommended
    from nasbench.report.verdict import verdicts
    from nasbench.runs import Run

    facts = collect(Run.open(Path(run)), _db(db))
    best = recommended(facts.main, budget) if facts.main else None
    return next((told for told in verdicts(facts)[0] if told.point is best), None)


def report(run: Folder, out: Folder | None = None, *, db: Folder | None = None) -> Path:
    """Writes the report of a run, by default into its folder report/, and returns the page's path."""
    from nasbench.report.facts import collect
    from nasbench.report.html import Page
    from nasbench.runs import Run

    opened = Run.open(Path(run))
    return Page.of(collect(opened, _db(db))).write(Path(out) if out else opened.report)
