"""Limits on what a placement costs, each on a workload of its own.

    --max cache=64MiB@64k --min decode_tok_s=8000@h200,64k,max --max ttft_ms=800@h200,32k,1 --max kl=0.02

A workload is `DEVICE,CONTEXT,BATCH`; what is left out is the search's own. `max` as the batch is the measured batch
that fits and decodes the most tokens/s. A context of `32k+256` is a prompt and an answer. A name that is no cost is a
task: its limit binds the score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.errors import UserError, unknown
from nasbench.core.sizes import format_size, parse_size
from nasbench.cost import CostModel, check_context, find_profiles, profiled_devices
from nasbench.search.trials import Target
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import Space

if TYPE_CHECKING:
    from nasbench.model.shapes import ModelSpec

Quantity = Callable[[Placement], float]
TOLERANCE = 1e-6
"""Share of a bound that sums and solvers may round away."""


@dataclass(frozen=True)
class Workload:
    """Where a cost is predicted.

    Attributes:
        context: tokens of a decoding sequence, or of a prompt.
        batch: sequences; 0 for the measured batch that fits and decodes the most tokens/s.
        answer: new tokens after the prompt.
    """

    device: str
    context: int
    batch: int
    answer: int = 0

    def __str__(self) -> str:
        answer = f"+{self.answer}" if self.answer else ""
        return f"{self.device},{format_size(self.context)}{answer},{self.batch or 'max'}"


@dataclass(frozen=True)
class Metric:
    """A cost. `more`: more of it is better. `size`: bytes, written as 64MiB. `decodes`: it has a decode step."""

    title: str
    more: bool = False
    size: bool = False


METRICS = {
    "decode_tok_s": Metric("new tokens/s of all sequences", more=True),
    "prefill_tok_s": Metric("prompt tokens/s of all sequences", more=True),
    "ttft_ms": Metric("time to the first token"),
    "tpot_ms": Metric("time of a decode step"),
    "request_ms": Metric("time of a prompt and its answer, contexts as 32k+256"),
    "cache": Metric("keys, values and states", size=True),
    "memory": Metric("weights, caches and activations of a decode step", size=True),
    "max_batch": Metric("sequences that fit", more=True),
    "j_per_token": Metric("energy of a new token"),
}


@dataclass(frozen=True)
class Limit:
    """A bound on a cost, or on a task's score.

    Attributes:
        metric: a name of METRICS, or a task.
        most: whether the bound is the most that is allowed, else the least.
        workload: None for a task.
    """

    metric: str
    most: bool
    bound: float
    workload: Workload | None = None

    def __str__(self) -> str:
        size = self.workload is not None and METRICS[self.metric].size
        bound = f"{self.bound / 2**20:g}MiB" if size else f"{self.bound:g}"
        return f"--{'max' if self.most else 'min'} {self.metric}={bound}{f'@{self.workload}' if self.workload else ''}"

    def excess(self, value: float) -> float:
        """How far a value is beyond the bound, as a share of it; 0 where it keeps to it, infinite for NaN."""
        if math.isnan(value):
            return math.inf
        over = (value - self.bound if self.most else self.bound - value) / self.bound
        return over if over > TOLERANCE else 0.0


def parse_limit(text: str, most: bool, target: Target, db: Path | None = None) -> Limit:
    """Reads `cache=64MiB@64k` or `kl=0.02`. Raises UserError naming what is wrong, and the legal values."""
    from nasbench.evaluation.tasks import parse_task, task_names

    option = f"--{'max' if most else 'min'}"
    name, found, rest = text.rpartition("=")
    name = name.strip()
    if not found or not name:
        raise UserError(f"bad {option} {text!r}: write NAME=VALUE[@DEVICE,CONTEXT,BATCH], as cache=64MiB@64k")
    value, _, place = rest.partition("@")
    if name in METRICS:
        bound = _bound(value, METRICS[name].size, f"{option} {text!r}")
        return Limit(name, most, bound, parse_workload(place, name, target, db))
    if re.split("[@:]", name)[0] not in task_names():
        raise unknown("limit", name, [*METRICS, *task_names()])
    if place:
        raise UserError(f"bad {option} {text!r}: a task has no workload")
    return Limit(parse_task(name).label, most, _bound(value, False, f"{option} {text!r}"))


def _bound(text: str, size: bool, where: str) -> float:
    try:
        value = float(parse_size(text)) if size else float(text)
    except ValueError as error:
        reason = str(error) if isinstance(error, UserError) else f"{text!r} is no number"
        raise UserError(f"bad {where}: {reason}") from None
    if not 0 < value < math.inf:
        raise UserError(f"bad {where}: {text} is no bound, write a finite number above 0")
    return value


def parse_workload(text: str, metric: str, target: Target, db: Path | None = None) -> Workload:
    """Reads `h200,64k,max`. Raises UserError."""
    device, sizes = target.device, []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        if part == "max" or part[0].isdigit():
            sizes.append(part)
        else:
            device = find_device(part, db)
    if len(sizes) > 2:
        raise UserError(f"bad workload {text!r} of {metric}: write DEVICE,CONTEXT,BATCH, as h200,64k,max")
    context, answer, batch = target.context, 0, target.batch
    if sizes and not (len(sizes) == 1 and sizes[0] == "max"):
        prompt, plus, more = sizes[0].partition("+")
        context, answer = parse_size(prompt), parse_size(more) if plus else 0
    if sizes and (len(sizes) == 2 or sizes[0] == "max"):
        batch = 0 if sizes[-1] == "max" else parse_size(sizes[-1])
    if not batch and metric != "decode_tok_s":
        raise UserError(f"bad workload {text!r} of {metric}: only decode_tok_s has a batch of max, write a number")
    if bool(answer) != (metric == "request_ms"):
        raise UserError(f"bad workload {text!r} of {metric}: request_ms alone has an answer, as 32k+256")
    return Workload(device, context, batch, answer)


def find_device(text: str, db: Path | None = None) -> str:
    """A profiled device by its name, or by a part of it that no other has. Raises UserError."""
    known = profiled_devices(db)
    matches = [text] if text in known else [name for name in known if text.lower() in name]
    if len(matches) != 1:
        raise unknown("device", text, matches or known)
    return matches[0]


class Costs:
    """What the cost models of several devices predict of one model's placements.

    Args:
        shape: the model.
        cost: of the search's own device.
        db: where the other devices' profiles are.
    """

    def __init__(self, shape: ModelSpec, cost: CostModel, db: Path | None = None) -> None:
        self.shape, self.db = shape, db
        self._models = {cost.device: cost}
        self.value = cache(self._value)
        self.batches = cache(self._batches)

    def model(self, device: str) -> CostModel:
        """Of a device, in the search's data type where it has rows of it."""
        if device not in self._models:
            from nasbench.cost import load_cost_model
            from nasbench.search.run_folder import choose_dtype

            rows = find_profiles(device, self.db)
            ours = next(iter(self._models.values())).dtype
            known = {row.dtype for row in rows if row.mode == "decode" and row.status == "ok"}
            dtype = choose_dtype(rows, ours if ours in known else "", device)
            self._models[device] = load_cost_model(device, self.shape, dtype, self.db)
        return self._models[device]

    def room_bytes(self, device: str) -> float:
        """Memory that a model may take there. Raises UserError where it is not known."""
        room = self.model(device).room_bytes
        if room is None:
            raise UserError(f"the memory of {device} is not known: choose a batch instead of max, and no max_batch")
        return room

    def _batches(self, device: str) -> list[int]:
        """The decode batches that were measured there."""
        rows = find_profiles(device, self.db)
        return sorted({row.batch for row in rows if row.mode == "decode" and row.status == "ok"})

    def _value(self, metric: str, at: Workload, placement: Placement) -> float:
        """Raises UserError naming rows that are missing."""
        if metric == "decode_tok_s":
            if not at.batch:
                return max((self.value(metric, one, placement) for one in self.fitting(at, placement)), default=0.0)
            return at.batch * 1e3 / self.value("tpot_ms", at, placement)
        if metric == "prefill_tok_s":
            return at.batch * at.context * 1e3 / self.value("ttft_ms", at, placement)
        if metric == "request_ms":
            halfway = replace(at, context=at.context + at.answer // 2, answer=0)
            return self.value("ttft_ms", at, placement) + at.answer * self.value("tpot_ms", halfway, placement)
        if metric == "max_batch":
            one, two = (self.value("memory", replace(at, batch=batch), placement) for batch in (1, 2))
            more = self.room_bytes(at.device) - one
            return max(0.0, more // (two - one) + 1) if two > one else math.inf
        return self.predict(metric, at, placement)

    def predict(self, metric: str, at: Workload, placement: Placement) -> float:
        """The costs that the others follow from: ttft_ms, tpot_ms, cache, memory, j_per_token."""
        cost = self.model(at.device)
        if metric == "ttft_ms":
            tok_s = cost.prefill(placement, at.context, at.batch).prefill_tok_s
            return at.batch * at.context * 1e3 / (tok_s or math.nan)
        if metric == "cache":
            return float(cost.cache(placement, at.context, at.batch).cache_bytes)
        if metric == "memory":
            return float(cost.cache(placement, at.context, at.batch).needed_bytes)
        found = cost.decode(placement, at.context, at.batch)
        value = found.step_ms if metric == "tpot_ms" else found.j_per_token
        if value is None:
            raise UserError(f"no energy is in the profile rows of {at.device}: choose another limit than j_per_token")
        return value

    def fitting(self, at: Workload, placement: Placement) -> list[Workload]:
        """The workload with every measured batch that fits and at which all blocks of the placement are measured."""
        found, room = [], self.room_bytes(at.device)
        for batch in self.batches(at.device):
            one = replace(at, batch=batch)
            if self.value("memory", one, placement) <= room:
                with suppress(UserError):  # of a block that is not measured there
                    self.value("tpot_ms", one, placement)
                    found.append(one)
        return found

    def check(self, limits: Sequence[Limit], space: Space) -> None:
        """Raises UserError for a context beyond the model's, and for rows that a limit needs and nobody measured."""
        for limit in limits:
            if limit.workload is not None:
                check_context(self.shape, limit.workload.context + limit.workload.answer)
                for name in space.names:
                    at, placement = limit.workload, space.homogeneous(name)
                    if not at.batch and not self.fitting(at, placement):
                        at = replace(at, batch=1)
                    self.value(limit.metric, at, placement)


@dataclass(frozen=True)
class Piece:
    """What a limit says of a sum over the layers: `value(placement) <= bound`."""

    value: Quantity
    bound: float


def pieces(costs: Costs, limit: Limit) -> list[list[Piece]]:
    """A limit on a cost as alternatives: it holds where all pieces of one of them hold. There are several for a batch
    of max, one for each measured batch."""
    metric, at, bound = limit.metric, limit.workload, limit.bound
    assert at is not None

    def of(metric: str, at: Workload, bound: float, most: bool) -> Piece:
        if most:
            return Piece(lambda placement: costs.value(metric, at, placement), bound)
        return Piece(lambda placement: -costs.value(metric, at, placement), -bound)

    if metric == "decode_tok_s" and not at.batch:
        room = costs.room_bytes(at.device)
        sizes = [replace(at, batch=batch) for batch in costs.batches(at.device)]
        return [[of("memory", one, room, True), of("tpot_ms", one, one.batch * 1e3 / bound, True)] for one in sizes]
    if metric == "max_batch":
        size = math.ceil(bound) if not limit.most else math.floor(bound) + 1
        return [[of("memory", replace(at, batch=size), costs.room_bytes(at.device), not limit.most)]]
    if metric in ("decode_tok_s", "prefill_tok_s"):  # whose inverse is a sum over the layers
        decodes = metric == "decode_tok_s"
        tokens = at.batch * (1 if decodes else at.context)
        return [[of("tpot_ms" if decodes else "ttft_ms", at, tokens * 1e3 / bound, not limit.most)]]
    return [[of(metric, at, bound, limit.most)]]
