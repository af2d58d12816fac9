"""Scores of a run's placements: each is measured once and kept in the run's score store."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError
from nasbench.data.packing import Corpus
from nasbench.evaluation.scores import ScoreKey, Scores, ScoreStore
from nasbench.evaluation.shared_layers import SharedLayers
from nasbench.evaluation.tasks import Context, Task, parse_task
from nasbench.model.block import kinds_without_varlen
from nasbench.model.decoder import Decoder
from nasbench.model.shapes import ModelSpec
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement
from nasbench.supernet.supernet import Supernet

SEARCH_TOKENS = 2048
"""Held-out tokens that score a placement while searching."""
TEXT = ("loss", "kl")
"""What every search measures; one reading gives both."""
IDENTICAL = "identical_to_model"
"""In `Scores.about` of a placement that the scored texts cannot tell from the model itself."""
log = logging.getLogger("nasbench")
Progress = Callable[[int, int], None]
"""Called with how many placements are done, and of how many."""


class Evaluator:
    """Scores placements of one supernet.

    Args:
        search_tokens: held-out tokens for split "search" (evenly many for every placement).
        test_tokens: the same for split "test", None for all there are.
        memo: what tasks make once, shared by evaluators of one model and corpus.
    """

    def __init__(
        self,
        run: Run,
        supernet: Supernet,
        corpus: Corpus,
        *,
        search_tokens: int = SEARCH_TOKENS,
        test_tokens: int | None = None,
        memo: dict[object, Any] | None = None,
    ) -> None:
        self.run, self.supernet = run, supernet
        self.corpus = corpus.without_documents() if kinds_without_varlen(supernet.mixers()) else corpus
        # A single row would have no standard error.
        least = 2 * corpus.sequence if corpus.sequence > run.spec.sequence else 0
        self.tokens: dict[str, int | None] = {"search": max(search_tokens, least), "test": test_tokens}
        self.store = ScoreStore(run.scores)
        self._memo: dict[object, Any] = {} if memo is None else memo
        self.layers = SharedLayers(supernet)

    @classmethod
    def open(
        cls,
        run: Run,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        search_tokens: int = SEARCH_TOKENS,
        test_tokens: int | None = None,
    ) -> Evaluator:
        """Loads the run's supernet and corpus. `dtype` None: bf16, in which the supernet was trained."""
        supernet = Supernet.load(run, dtype=dtype or torch.bfloat16, device=device)
        corpus = scoring_corpus(run, supernet.teacher.shape, supernet.tokenizer)
        return cls(run, supernet, corpus, search_tokens=search_tokens, test_tokens=test_tokens)

    @property
    def dtype(self) -> str:
        """As score keys name it."""
        return str(self.supernet.teacher.dtype).removeprefix("torch.")

    def context(self, split: str) -> Context:
        """What tasks see, for a split of the held-out text."""
        return Context(
            self.supernet.tokenizer, self.corpus, self.supernet.teacher, split, self.tokens[split], self._memo
        )

    def key(self, placement: Placement, task: Task, context: Context, title: str = "") -> ScoreKey:
        """A score's key in the store. `title`: of another measure out of the same reading."""
        return ScoreKey.of(self.supernet.version, placement, title or task.title, task.settings(context), self.dtype)

    def scores(self, placement: Placement, tasks: Sequence[str | Task], split: str = "test") -> dict[str, Scores]:
        """The scores of one placement by task label. Raises UserError."""
        return self.measure([placement], split, tasks=tasks)[0]

    def measure(
        self,
        placements: Sequence[Placement],
        split: str = "search",
        progress: Progress = lambda done, total: None,
        *,
        tasks: Sequence[str | Task] = TEXT,
    ) -> list[dict[str, Scores]]:
        """Scores by task label, of every placement in order. What the store has is not measured again.

        Raises:
            UserError: a placement or a task that is not legal here.
            MachineError: a score that is not finite.
        """
        context = self.context(split)
        parsed = [parse_task(task) if isinstance(task, str) else task for task in tasks]
        columns = {task.label: self._measure_task(task, placements, context, progress) for task in parsed}
        return [{label: found[placement] for label, found in columns.items()} for placement in placements]

    def first_rows(self, placements: Sequence[Placement], task: str, rows: int) -> NDArray[np.float64]:
        """[placements, rows] scores of a task over text on the first rows of the search split."""
        context = replace(self.context("search"), tokens=rows * self.corpus.sequence)
        found = self._measure_task(parse_task(task), placements, context, lambda done, total: None)
        return np.array([found[placement].samples for placement in placements])

    def known(self, placement: Placement, task: Task, context: Context) -> Scores | None:
        """A score that is in the store, also as a part of a larger task's samples."""
        found, larger = self.store.get(self.key(placement, task, context)), task.larger()
        if found is None and larger is not None:
            whole = self.store.get(self.key(placement, larger, context))
            if whole is not None and whole.samples is not None:
                return Scores.of(task.pick(whole.samples), whole.metric, whole.higher_is_better, whole.about)
        return found

    def _measure_task(
        self, task: Task, placements: Sequence[Placement], context: Context, progress: Progress
    ) -> dict[Placement, Scores]:
        found = {placement: self.known(placement, task, context) for placement in placements}
        # Neighbours in sorted order share the layers that they begin with.
        missing = sorted(placement for placement, scores in found.items() if scores is None)
        for placement in missing:
            self.supernet.space.check(placement)
        task.check(context)
        same = self.identical(missing, task.scored_tokens(context)) if missing else set()
        if same:
            log.warning(
                "%s: its texts of %d tokens cannot tell these from the model itself: %s", task.label,
                task.scored_tokens(context), ", ".join(map(format_placement, sorted(same))),
            )  # fmt: skip
        for placement, measures in self._samples(task, missing, context, progress):
            device = self.supernet.teacher.device
            new = {title: task.scores(samples, title, context, device) for title, samples in measures.items()}
            if placement in same:
                new = {t: replace(s, about={**s.about, IDENTICAL: True}) for t, s in new.items()}
            self.store.put({self.key(placement, task, context, title): scores for title, scores in new.items()})
            found[placement] = new[task.title]
        return {placement: scores for placement, scores in found.items() if scores is not None}

    def identical(self, placements: Sequence[Placement], tokens: int) -> set[Placement]:
        """Those that are the model itself on texts of `tokens` tokens, though another placement: windows as long as the
        text, with the model's own weights."""
        net, own = self.supernet, self.supernet.space.original
        far = {p for p in placements if p != own and net.teacher.shape.exact_until(p) >= tokens}
        layers = {(i, name) for p in far for i, name in enumerate(p) if name != own[i]}
        trained = {
            (i, name) for i, name in layers if not _same_weights(net.layer(i, name), net.teacher.layers[i])
        }  # fmt: skip
        return {p for p in far if trained.isdisjoint(enumerate(p))}

    @torch.inference_mode()
    def _samples(
        self, task: Task, placements: Sequence[Placement], context: Context, progress: Progress
    ) -> Iterator[tuple[Placement, dict[str, Tensor]]]:
        """What a task measures of sorted placements.

        The layers that a placement shares with those before it are not computed again: neighbours in a search cost a
        fraction of a forward each.
        """
        teacher = self.supernet.teacher
        reading = task.reading(teacher, context) if placements else None
        if reading is None:
            for done, placement in enumerate(placements, 1):
                yield placement, task.measures(self.supernet.select(placement), context)
                progress(done, len(placements))
            return
        parts: dict[Placement, list[tuple[Tensor, ...]]] = {placement: [] for placement in placements}
        done, total = 0, len(placements) * len(reading.batches)
        text = self.supernet.version, task.label, task.settings(context)
        for index, batch in enumerate(reading.batches):
            for placement, hidden in self.layers.hidden(placements, (*text, index), batch, reading):
                parts[placement].append(reading.read(teacher, index, hidden))
                done += 1
                progress(done * len(placements) // total, len(placements))
        for placement, read in parts.items():
            yield placement, reading.samples(read)


def scoring_corpus(run: Run, shape: ModelSpec, tokenizer: Tokenizer) -> Corpus:
    """The run's text in rows that score its placements: as long as those of training, or twice the largest window, so
    that windows can be told from full attention, where the model and the text have room for it."""
    kinds = [shape.mixer(name, at) for name in run.spec.space.efficient_names for at in run.spec.space.may_be_full[:1]]
    windows = [int(kind.exact_until) for kind in kinds if kind.exact_until < math.inf]
    length = min(shape.max_context, max(run.spec.sequence, *(2 * window for window in [0, *windows])))
    if length > run.spec.sequence:
        with contextlib.suppress(UserError):
            return Corpus.load(run.spec.data, tokenizer, length)
    return Corpus.load(run.spec.data, tokenizer, run.spec.sequence)


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name] is theirs[name] or torch.equal(ours[name], theirs[name]) for name in ours
    )


def score_checkpoint(
    decoder: Decoder, tasks: Sequence[Task], context: Context, folder: Path | None = None
) -> dict[str, Scores]:
    """Scores by task label of a decoder without a run.

    Args:
        folder: keeps the scores, every measure of a task item by item; what is there is not measured again.
    """
    if kinds_without_varlen(decoder.mixers):
        context = replace(context, corpus=context.corpus.without_documents())
    store = ScoreStore(folder) if folder else None
    dtype = str(decoder.dtype).removeprefix("torch.")
    weights = model_digest(decoder, context.tokenizer) if folder else ""
    found = {}
    for task in tasks:
        task.check(context)

        def key(title: str, task: Task = task) -> ScoreKey:
            return ScoreKey.of(weights, decoder.placement, title, task.settings(context), dtype)

        known = store.get(key(task.title)) if store else None
        if known is None:
            new = task.all_scores(decoder, context)
            if store:
                store.put({key(title): scores for title, scores in new.items()})
            known = new[task.title]
        found[task.label] = known
    return found


def model_digest(decoder: Decoder, tokenizer: Tokenizer) -> str:
    """Tells models apart on any device: all that a configuration says, the tokenizer, and the bits of the weights,
    summed along rows and along columns so that their order counts."""
    digest = hashlib.sha256(f"{replace(decoder.shape, name='', source='')} {tokenizer.fingerprint}".encode())
    for name, tensor in decoder.state_dict().items():
        bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])
        bits = bits.reshape(len(tensor) if tensor.dim() else 1, -1)
        sums = [bits.sum(axis, dtype=torch.int64) for axis in (0, 1)]
        told = [int((one * torch.arange(1, len(one) + 1, device=one.device)).sum()) for one in sums]
        digest.update(f"{name} {tuple(tensor.shape)} {told}".encode())
    return digest.hexdigest()[:16]
