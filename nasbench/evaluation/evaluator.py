"""Scores of a run's placements, measured once and kept in evals.csv."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.data.packing import Batch, Corpus
from nasbench.evaluation.evals_file import EvalsFile, Key
from nasbench.evaluation.importance import Importance, layer_importance
from nasbench.evaluation.reading import Ends, Text
from nasbench.evaluation.score import Score
from nasbench.evaluation.tasks import Context, Task, held_out_key, parse_task, summarise
from nasbench.model.decoder import Decoder
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement
from nasbench.supernet.forward import hidden_of, kinds_without_varlen, meta_of
from nasbench.supernet.losses import Distribution, teacher_distribution, token_losses
from nasbench.supernet.supernet import Supernet

SEARCH_TOKENS = 2048
"""Held-out tokens that score a placement while searching."""
SHARED_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens that `measure` forwards at once: its memory is layers x these x hidden size."""

KEPT_BYTES = 1 << 30
"""Teacher's distributions are kept up to this size: making them again would be a third of a CPU's time for a score."""

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
        self.tokens: dict[str, int | None] = {"search": search_tokens, "test": test_tokens}
        self.cache = EvalsFile(run.evals)
        self._teachers: dict[tuple[str, int], Tensor | Distribution] = {}
        self._memo: dict[object, Any] = {} if memo is None else memo

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
        corpus = Corpus.load(run.spec.data, supernet.tokenizer, run.spec.sequence)
        return cls(run, supernet, corpus, search_tokens=search_tokens, test_tokens=test_tokens)

    def context(self, split: str) -> Context:
        """What tasks see, for a split of the held-out text."""
        return Context(
            self.supernet.tokenizer, self.corpus, self.supernet.teacher, split, self.tokens[split], self._memo
        )

    def key(self, placement: Placement, task: str, detail: str) -> Key:
        """A score's key in evals.csv."""
        dtype = str(self.supernet.teacher.dtype).removeprefix("torch.")
        return Key(format_placement(placement), task, detail, self.supernet.version, dtype)

    def scores(self, placement: Placement, tasks: Sequence[str | Task], split: str = "test") -> dict[str, Score]:
        """The scores of one placement by task label, measured where evals.csv has none yet. Raises UserError."""
        context = self.context(split)
        parsed = [parse_task(task) if isinstance(task, str) else task for task in tasks]
        result: dict[str, Score] = {}
        decoder: Decoder | None = None
        for task in parsed:
            key = self.key(placement, task.label, task.key(context))
            score = self.cache.get(key)
            if score is None and task.label in ("loss", "kl"):
                score = self.measure([placement], split)[0][task.label]
            elif score is None:
                decoder = decoder or self.supernet.select(placement)
                score = task.score(decoder, context)
                self.cache.merge({key: score})
            result[task.label] = score
        return result

    def losses(
        self, placements: Sequence[Placement], split: str = "search", progress: Progress | None = None
    ) -> list[Score]:
        """Held-out loss of every placement, in order; see `measure`."""
        return [scores["loss"] for scores in self.measure(placements, split, progress)]

    def divergences(
        self, placements: Sequence[Placement], split: str = "search", progress: Progress | None = None
    ) -> list[Score]:
        """KL to the teacher of every placement, in order; see `measure`."""
        return [scores["kl"] for scores in self.measure(placements, split, progress)]

    def measure(
        self, placements: Sequence[Placement], split: str = "search", progress: Progress | None = None
    ) -> list[dict[str, Score]]:
        """Held-out loss and KL to the teacher of every placement, as {"loss": Score, "kl": Score}, in order. Known
        scores come from evals.csv."""
        detail = held_out_key(self.context(split))
        wanted = sorted({p for p in placements if self.cache.get(self.key(p, "kl", detail)) is None})
        new: dict[Key, Score] = {}
        for placement, columns in self.held_out(wanted, split, progress).items():
            for task, values in zip(("loss", "kl"), columns, strict=True):
                new[self.key(placement, task, detail)] = summarise(task, "nats", values, False)
        self.cache.merge(new)
        return [
            {task: self.cache.scores[self.key(placement, task, detail)] for task in ("loss", "kl")}
            for placement in placements
        ]

    @torch.inference_mode()
    def held_out(
        self, placements: Sequence[Placement], split: str, progress: Progress | None = None
    ) -> dict[Placement, tuple[Tensor, Tensor]]:
        """Loss and KL of every row of a split [rows], measured now.

        Placements are walked in sorted order, and the hidden states of the layers that a placement shares with the
        one before it are not computed again: neighbours in a search cost a fraction of a forward each.
        """
        wanted = sorted(set(placements))
        for placement in wanted:
            self.supernet.space.check(placement)
        device = self.supernet.teacher.device
        sequences = self.corpus.held_out(split, self.tokens[split]).to(device)
        values: dict[Placement, list[tuple[Tensor, Tensor]]] = {placement: [] for placement in wanted}
        batches = sequences.split(max(1, SHARED_TOKENS[device.type] // self.corpus.sequence))
        done, total = 0, len(wanted) * len(batches)
        for index, batch in enumerate(batches if wanted else ()):
            reference = self._teacher(split, index, batch)
            for placement, hidden in self._shared_prefixes(wanted, batch):
                nll, kl = token_losses(hidden, batch.tokens, self.supernet.teacher.head_weight, reference)
                assert kl is not None
                values[placement].append((batch.per_row(nll), batch.per_row(kl)))
                done += 1
                if progress:
                    progress(done * len(wanted) // total, len(wanted))
        return {
            placement: (torch.cat([loss for loss, _ in parts]).cpu(), torch.cat([kl for _, kl in parts]).cpu())
            for placement, parts in values.items()
        }

    @torch.inference_mode()
    def divergences_at_ends(self, placements: Sequence[Placement], texts: Sequence[Text]) -> dict[Placement, Tensor]:
        """KL to the teacher in nats, mean over the tokens of each text's end, [texts] fp32 of every placement: what an
        answer loses. Measured now; work is shared as in `held_out`."""
        wanted, teacher = sorted(set(placements)), self.supernet.teacher
        ends = Ends(texts, teacher.shape.max_context, teacher.device, SHARED_TOKENS[teacher.device.type])
        parts: dict[Placement, list[Tensor]] = {placement: [] for placement in wanted}
        for part in ends.batches:
            batch, row, place = Batch(part.tokens), part.row, part.place
            target = _log_p(teacher, hidden_of(teacher, batch)[row, place - 1])
            for placement, hidden in self._shared_prefixes(wanted, batch):
                log_p = _log_p(teacher, hidden[row, place - 1])
                parts[placement].append(torch.linalg.vecdot(target.exp(), target - log_p))
        return {
            placement: torch.from_numpy(ends.sums(ends.in_order(kl)) / ends.counts).float()
            for placement, kl in parts.items()
        }

    def _teacher(self, split: str, index: int, batch: Batch) -> Tensor | Distribution:
        """What the teacher says of a batch, kept: its distribution while there is room, else its final hidden states,
        from which its logits are made again chunk by chunk."""
        key = (split, index)
        if key not in self._teachers:
            hidden, weight = hidden_of(self.supernet.teacher, batch), self.supernet.teacher.head_weight
            kept = sum(said.p.nbytes for said in self._teachers.values() if isinstance(said, Distribution))
            fits = kept + batch.tokens.numel() * len(weight) * 4 <= KEPT_BYTES
            self._teachers[key] = teacher_distribution(hidden, weight) if fits else hidden
        return self._teachers[key]

    def _shared_prefixes(self, placements: Sequence[Placement], batch: Batch) -> Iterator[tuple[Placement, Tensor]]:
        """Final hidden states of sorted placements. states[i] is what layer i reads, for the last placement walked."""
        teacher = self.supernet.teacher
        meta = meta_of(teacher, batch)
        states = [teacher.embed(batch.tokens)]
        last: Placement = ()
        for placement in placements:
            shared = next(
                (i for i, pair in enumerate(zip(placement, last, strict=False)) if pair[0] != pair[1]), len(last)
            )
            del states[shared + 1 :]
            for i in range(shared, len(placement)):
                states.append(self.supernet.layer(i, placement[i])(states[-1], meta))
            last = placement
            yield placement, teacher.model.norm(states[-1])

    def importance(self, names: Sequence[str] | None = None, progress: Progress | None = None) -> list[Importance]:
        """How much every layer is needed: the loss when it alone is replaced by each alternative, on split "search".

        Writes runs/NAME/importance.csv. Sorted by layer, then name.
        """
        return layer_importance(self, names, progress)


def _log_p(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Final normalised hidden states [M, C] -> log-probabilities [M, V] fp32."""
    return F.log_softmax(decoder.logits(hidden), -1, dtype=torch.float32)
