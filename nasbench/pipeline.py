"""Runs a recipe: a TOML file of stages, each of them a command that a person would type.

    title = "..."                     what the recipe does
    [settings]                        words for the commands; `--set NAME=VALUE` changes one
    [budget]                          settings that `--set scale=X` multiplies: sizes "16k", counts 40, seconds 40.0
    [training]                        settings of `nasbench distill --config`, written to OUT/training.toml
    [[stage]]
    title = "distill: ..."            what the log says
    command = "distill --out {out}"   {NAME} becomes the setting; a list becomes several words
    each = "counts"                   optional: one stage for each comma-separated part of a setting, its {each}
    makes = "{out}/report/index.html" optional: a file without which the stage is not done
    seconds = { cpu = 60, cuda = 9 }  optional, for --dry-run: a measured time, or a list of budget names

Every table may hold tables [.cpu] and [.cuda], which count on that kind of device only. The settings `out`, `db`
(OUT/profiles), `device`, `dtype` and `training` (OUT/training.toml) always exist.

OUT/pipeline.json keeps the finished stages with their times. The same command again skips them.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasbench.core.errors import UserError, unknown
from nasbench.core.files import read_json, read_toml, sole, write_json, write_text
from nasbench.core.sizes import format_size, parse_budget, parse_size

RECIPES = Path(__file__).parent / "recipes"
KINDS = ("cpu", "cuda")
LEAST_TOKENS, LEAST_COUNT = 1024, 8
"""A scaled budget does not fall below these."""
MOST_SCALE = 1000.0
DTYPES = ("auto", "fp32", "bf16")
_STAGE_KEYS = ("title", "command", "each", "makes", "seconds")
_TABLES = ("title", "settings", "budget", "training", "stage")

Log = Callable[[str], None]
Execute = Callable[[list[str]], int]
"""Runs one command line (without the word `nasbench`) and returns its exit code."""


@dataclass(frozen=True)
class Step:
    """One command of a planned run.

    Attributes:
        words: the command line behind `nasbench`.
        makes: a file that the step leaves, None where the recipe names none.
        seconds: the time that it takes, None where nobody has said.
    """

    title: str
    words: tuple[str, ...]
    makes: Path | None = None
    seconds: float | None = None

    @property
    def command(self) -> str:
        return shlex.join(["nasbench", *self.words])


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file says it."""

    name: str
    title: str
    settings: dict[str, Any]
    budget: dict[str, Any]
    training: dict[str, Any]
    stages: tuple[dict[str, Any], ...]

    def values(self, device: str, changes: dict[str, str]) -> dict[str, Any]:
        """The settings for a device, changed and scaled. Raises UserError for an unknown name or a bad scale."""
        kind = device.split(":")[0]
        budget = _overlaid(self.budget, kind)
        known = {"scale": "1", "dtype": "auto", **_overlaid(self.settings, kind), **budget}
        for name in changes:
            if name not in known:
                raise unknown("setting", name, known)
        told = {name: shlex.split(text) if isinstance(known[name], list) else text for name, text in changes.items()}
        found = {**known, **told}
        try:
            scale = float(found["scale"])
        except ValueError:
            scale = 0.0
        if not 0 < scale <= MOST_SCALE:
            raise UserError(f"bad scale {found['scale']!r}: choose a number above 0 and up to {MOST_SCALE:.0f}")
        return {**found, **{name: _scaled(name, found[name], like, scale) for name, like in budget.items()}}


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(text: str) -> Recipe:
    """A shipped recipe by its name, or a TOML file. Raises UserError naming what is wrong with it."""
    path = RECIPES / f"{text}.toml" if text in recipe_names() else Path(text)
    if path.suffix != ".toml":
        raise unknown("recipe", text, recipe_names())
    data = read_toml(path)
    for key in data:
        if key not in _TABLES:
            raise unknown(f"table of {path}", key, _TABLES)
    stages = data.get("stage")
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{path} has no stage: write at least one [[stage]] with title and command")
    for number, stage in enumerate(stages, 1):
        for key in stage:
            if key not in _STAGE_KEYS:
                raise unknown(f"key of stage {number} of {path}", key, _STAGE_KEYS)
        if not isinstance(stage.get("title"), str) or not isinstance(stage.get("command"), str):
            raise UserError(f"{path}: stage {number} needs a title and a command")
    tables = {name: data.get(name, {}) for name in ("settings", "budget", "training")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name} is not a table")
    return Recipe(path.stem, str(data.get("title", path.stem)), **tables, stages=tuple(stages))


def _overlaid(table: dict[str, Any], kind: str) -> dict[str, Any]:
    """The table's own entries, then those of its table for the kind of device."""
    own = {name: value for name, value in table.items() if name not in KINDS}
    return {**own, **table.get(kind, {})}


def _scaled(name: str, value: Any, like: Any, scale: float) -> str:
    """A budget times the scale: a size, a count or seconds, as the recipe's own value is one."""
    try:
        if isinstance(like, str):
            size = parse_budget(value)
            return str(value) if scale == 1 or not size else format_size(max(LEAST_TOKENS, int(size * scale)))
        if isinstance(like, int):
            return str(int(value) if scale == 1 else max(LEAST_COUNT, int(int(value) * scale)))
        if float(value) >= 0:
            return f"{float(value) * scale:g}"
    except (UserError, ValueError):
        pass
    kind = "a size, as 16k" if isinstance(like, str) else "a whole number" if isinstance(like, int) else "seconds"
    raise UserError(f"bad {name} {value!r}: write {kind}")


def plan(recipe: Recipe, values: dict[str, Any]) -> list[Step]:
    """The steps of a recipe with these settings. Raises UserError for a setting that a stage names and nobody has."""
    steps: list[Step] = []
    for stage in recipe.stages:
        try:
            steps += _steps(stage, values)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"recipe {recipe.name}, stage {stage['title'][:60]!r}: {error}") from None
    return steps


def _steps(stage: dict[str, Any], values: dict[str, Any]) -> Iterator[Step]:
    parts: list[dict[str, Any]] = [{}]
    if each := stage.get("each"):
        if each not in values:
            raise unknown("setting", each, values)
        parts = [{"each": part.strip()} for part in str(values[each]).split(",") if part.strip()]
    for part in parts:
        known = {**values, **part}
        makes = Path(_filled(stage["makes"], known)) if "makes" in stage else None
        words = tuple(word for text in shlex.split(stage["command"]) for word in _words(text, known))
        yield Step(_filled(stage["title"], known), words, makes, _seconds(stage, known))


def _filled(text: str, values: dict[str, Any]) -> str:
    try:
        return text.format_map(values)
    except KeyError as error:
        raise unknown("setting", error.args[0], values) from None
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError(f"bad text {text!r} in a recipe: {error}") from None


def _words(text: str, values: dict[str, Any]) -> list[str]:
    """One word of a command with its settings in place; a setting that is a list is as many words."""
    whole = values.get(text[1:-1]) if text[:1] == "{" and text[-1:] == "}" else None
    return [str(word) for word in whole] if isinstance(whole, list) else [_filled(text, values)]


def _seconds(stage: dict[str, Any], values: dict[str, Any]) -> float | None:
    found = stage.get("seconds")
    if isinstance(found, dict):
        found = found.get(str(values["device"]).split(":")[0])
    if isinstance(found, list):
        return sum(float(values[name]) for name in found)
    return None if found is None else float(found)


class State:
    """OUT/pipeline.json: what a run of a recipe has done, and the settings of this one. Changes are written at once.

    Attributes:
        about: what the file says of the recipe beside its stages.
        training: text of OUT/training.toml, None for no such file.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / "pipeline.json"
        self.settings: dict[str, Any] = {}
        self.about: dict[str, Any] = {}
        self.training: str | None = None
        self.read()

    def read(self) -> None:
        self.data: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}
        if not isinstance(self.data, dict) or not isinstance(self.data.setdefault("stages", {}), dict):
            raise UserError(f"{self.path} is not the state of a recipe: remove it, and every stage is checked again")

    def write(self) -> None:
        write_json(self.path, self.data)

    def write_training(self) -> None:
        if self.training is not None:
            write_text(self.path.with_name("training.toml"), self.training)

    def done(self, step: Step) -> bool:
        known = self.data["stages"].get(step.command, {})
        return bool(known.get("done")) and (step.makes is None or step.makes.exists())

    def begin(self, step: Step, later: Sequence[Step]) -> None:
        """Marks the step and those after it as not done: they read what it writes."""
        for each in (step, *later):
            self.data["stages"].setdefault(each.command, {"title": each.title, "seconds": 0.0})["done"] = False
        self.write()

    def end(self, step: Step, seconds: float, done: bool) -> None:
        known = self.data["stages"][step.command]
        known |= {"seconds": round(known["seconds"] + seconds, 1), "done": done}
        self.write()


def prepare(recipe: Recipe, out: Path, device: str, changes: dict[str, str]) -> tuple[list[Step], State]:
    """The steps of a run and its state; looks at no weights and writes no file.

    Args:
        device: a torch device that is there.

    Raises UserError for settings that the recipe or the model does not take.
    """
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cost import check_context
    from nasbench.devices.dtype import faster_dtype

    state = State(out)
    values = recipe.values(device, changes)
    if values["dtype"] not in DTYPES:
        raise unknown("dtype", values["dtype"], DTYPES)
    if "model" in values and "context" in values:
        check_context(resolve_shape(str(values["model"])), parse_size(values["context"]))
    if values["dtype"] == "auto":
        # The first run's choice stays: a second measurement may come out the other way on a busy machine.
        values["dtype"] = state.about["dtype"] = state.data.get("dtype") or faster_dtype(device)
    training = out / "training.toml"
    values |= {"out": str(out), "db": str(out / "profiles"), "device": device, "training": str(training)}
    steps = plan(recipe, values)
    settings = _overlaid(recipe.training, device.split(":")[0])
    # JSON's numbers, texts and lists are TOML's, too.
    state.training = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    state.about["recipe"] = recipe.name
    state.settings = values
    return steps, state


def memory_words(values: dict[str, Any]) -> str:
    """What the model and its cache at the target take; "" where the recipe names no target."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.core.dtypes import dtype_bytes

    if not {"model", "context", "batch"} <= set(values):
        return ""
    shape, context, batch = resolve_shape(str(values["model"])), parse_size(values["context"]), int(values["batch"])
    width = dtype_bytes(str(values["dtype"]))
    cache = shape.num_layers * shape.mixer("A").cache_bytes(batch, context, width)
    return (
        f"{shape.name}: {shape.parameters() * width >> 20:,} MiB of weights, {cache >> 20:,} MiB of cache with full "
        f"attention at context {format_size(context)}, batch {batch}"
    )


def run_steps(steps: Sequence[Step], state: State, execute: Execute, log: Log) -> int:
    """Runs what is not done. Returns 0, or the exit code of the step that failed. Writes OUT/training.toml first.

    Raises UserError where another process runs a recipe in the same folder.
    """
    told = f"another process runs a recipe in {state.path.parent}: choose another --out"
    with sole(state.path.with_name(".pipeline.lock"), told):
        state.read()  # another process may have gone on since
        state.data |= state.about
        state.write()
        state.write_training()
        for number, step in enumerate(steps):
            log(f"\n[{number + 1}/{len(steps)}] {step.title}\n      {step.command}")
            if state.done(step):
                log("      done before")
                continue
            state.begin(step, steps[number + 1 :])
            began, code = time.monotonic(), 1
            try:
                code = execute(list(step.words))
            finally:
                seconds = time.monotonic() - began
                state.end(step, seconds, code == 0)
            if code:
                return code
            log(f"      {step.title}: {seconds:.0f} s")
        return 0
