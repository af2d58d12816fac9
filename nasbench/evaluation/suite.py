"""Benchmarks from JSONL, the form of an item read from its keys:

    {"query", "choices", "gold"}      the likeliest choice behind the query, for its length in bytes
    {"prefixes", "suffix", "gold"}    the prefix behind which the suffix is likeliest
    {"query", "answers"}              one line written greedily: right if one of the answers occurs in it, case-blind

`suite:FILE.jsonl` reads all items, `suite@200:FILE.jsonl` 200 of them, evenly spread over the file; it puts a space
between query and choice. `mc:FILE.jsonl` reads choices as they are written, with their own white space; `mc-plain` does
not divide by the length. White space at the end of what stands before an alternative moves into the alternative, as in
lm-evaluation-harness: a tokenizer joins a word with the space before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import UserError
from nasbench.core.files import machine_errors
from nasbench.evaluation.reading import Ends, Reading, Text
from nasbench.evaluation.tasks import TASKS, Context, Task, parse_length
from nasbench.model.decoder import Decoder
from nasbench.runtime.generate import generate

ANSWER_TOKENS = 24
"""Longest line that is written as an answer."""
PROMPTS = ByDevice(cpu=32, cuda=256)
"""Answers that `generate` writes at once. For 24 prompts of SmolLM2-135M on a CPU core it took 83 s. Jacobi decoding,
which reads all lines again with guesses for their tokens, took 218 s, and 43 s where every guess was right."""
FORMS = ({"query", "choices", "gold"}, {"prefixes", "suffix", "gold"}, {"query", "answers"})
VERSION = "v2"
"""Of the rule for white space; a part of every score's settings."""


@dataclass(frozen=True)
class SuiteItem:
    """One item: its alternatives as (context, continuation), of which `gold` is right, or a query and its answers."""

    alternatives: tuple[tuple[str, str], ...] = ()
    gold: int = 0
    query: str = ""
    answers: tuple[str, ...] = ()


def _item(data: Any) -> SuiteItem:
    """Raises KeyError, TypeError or ValueError for what is none of the forms."""
    keys = set(data) if isinstance(data, dict) else set()
    form = next((form for form in FORMS if form <= keys), None)
    if form is None:
        raise TypeError("the keys must be " + " or ".join(", ".join(sorted(form)) for form in FORMS))
    lists = data.get("choices") or data.get("prefixes") or data.get("answers")
    texts = [*lists, data.get("query", ""), data.get("suffix", "")] if isinstance(lists, list) else [None]
    if not all(isinstance(text, str) for text in texts) or not lists or not all(lists):
        raise TypeError("texts, and lists of texts that are not empty")
    if "answers" in form:
        return SuiteItem(query=data["query"], answers=tuple(data["answers"]))
    pairs = [(data["query"], choice) for choice in data.get("choices", ())]
    pairs = pairs or [(prefix, data["suffix"]) for prefix in data["prefixes"]]
    if type(data["gold"]) is not int or not 0 <= data["gold"] < len(pairs) >= 2:
        raise TypeError("gold must be the index of one of at least 2 alternatives")
    return SuiteItem(tuple(pairs), data["gold"])


def read_items(path: Path) -> list[SuiteItem]:
    """Raises UserError with file and line for a bad item, for items of both kinds, and for a file without any."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    with machine_errors(f"reading {path}"):
        lines = path.read_bytes().splitlines()
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line)))
            if bool(items[-1].answers) != bool(items[0].answers):
                raise TypeError("some items ask for a choice, some for an answer")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not an item of a benchmark: {error}") from None
    if not items:
        raise UserError(f"{path} holds no item")
    return items


def evenly(count: int, total: int) -> list[int]:
    """Indexes of `count` of `total` items, evenly spread; all of them where there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def chance(items: list[SuiteItem]) -> float:
    """What guessing scores."""
    return sum(1 / len(item.alternatives) if item.alternatives else 0.0 for item in items) / len(items)


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, behind the token that begins every text, where the model was trained with one."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [ids if ids[:1] == begin else begin + ids for ids in tokenizer.encode_batch(texts)]


def tokenised(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each pair of texts, as lm-evaluation-harness cuts them: tokenised together, what
    stands behind as many tokens as the context alone has is the continuation."""
    moved = [(first.rstrip(), first[len(first.rstrip()) :] + second) for first, second in texts]
    # Alternatives of one question mostly share its text.
    firsts = list(dict.fromkeys(first for first, _ in moved))
    prefixes = dict(zip(firsts, encode_prompts(tokenizer, firsts), strict=True))
    pairs = []
    for (first, second), whole in zip(moved, encode_prompts(tokenizer, [a + b for a, b in moved]), strict=True):
        tail = whole[len(prefixes[first]) :] or tokenizer.encode(second)
        before = prefixes[first] or [tokenizer.prefix_id]
        # A continuation that begins with the token that stands for an empty context does not get it twice.
        pairs.append((before, tail[1:] if not first and tail[:1] == before and tail[1:] else tail))
    return pairs


class Choices(Ends):
    """The alternatives of all questions, those of one question beside each other.

    Args:
        pairs: (context, continuation) of every alternative, tokenised.
        count: alternatives of each question, [questions] int64.
        lengths: of each accuracy by its title, what an alternative's log-likelihood is divided by, [alternatives] fp64.
        gold: the right alternative of each question, [questions] int64.
    """

    def __init__(
        self, pairs: Sequence[tuple[list[int], list[int]]], count: np.ndarray, lengths: dict[str, np.ndarray],
        gold: np.ndarray, longest: int, device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__([Text(first + second, len(second)) for first, second in pairs], longest, device)
        self.lengths, self.gold = lengths, gold
        self.ends = count.cumsum()[:-1]

    def judge(self, log_p: np.ndarray, right: np.ndarray) -> dict[str, Tensor]:
        """1 where the right alternative is the likeliest; of equally likely ones the first counts."""
        sums = self.sums(log_p)
        return {title: self.correct(sums / length) for title, length in self.lengths.items()}

    def correct(self, values: np.ndarray) -> Tensor:
        """[questions] fp32, from a value of every alternative."""
        chosen = [part.argmax() for part in np.split(values, self.ends)]
        return torch.from_numpy(chosen == self.gold).float()


@dataclass(frozen=True)
class Suite(Task):
    """Accuracy over the items of a file.

    Attributes:
        limit: how many of them, 0 for all.
    """

    path: Path
    limit: int = 0
    name: ClassVar[str] = "suite"
    delimiter: ClassVar[str] = " "

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        if not argument:
            raise UserError(f"task {cls.name} needs its items: write {cls.name}:FILE.jsonl")
        return cls(Path(argument), parse_length(cls.name, length, 0))

    @property
    def _head(self) -> str:
        return self.name + (f"@{self.limit}" if self.limit else "")

    @property
    def label(self) -> str:
        return f"{self._head}:{self.path}"

    @property
    def title(self) -> str:
        return f"{self._head}:{self.path.stem}"

    def lengths(self) -> dict[str, Callable[[str], int]]:
        """What each accuracy divides the log-likelihood of a continuation by, the task's own first: the harness's
        acc_bytes, acc and acc_norm."""
        return {self.title: _bytes, f"{self.title}.plain": _one, f"{self.title}.characters": len}

    def settings(self, context: Context) -> str:
        def digest() -> str:
            read_items(self.path)
            return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

        begin = "" if context.tokenizer.bos_id is None else "+bos"
        return f"{VERSION}{begin}/{context.once((self.path, 'digest'), digest)}"

    def items(self) -> list[SuiteItem]:
        """Those that are evaluated."""
        items = read_items(self.path)
        return [items[i] for i in evenly(self.limit or len(items), len(items))]

    def scored_tokens(self, context: Context) -> int:
        def longest() -> int:
            items = self.items()
            texts = [first + self.delimiter + second for item in items for first, second in item.alternatives]
            texts += [item.query for item in items if item.answers]
            room = ANSWER_TOKENS if items[0].answers else 0
            return max(map(len, encode_prompts(context.tokenizer, texts))) + room

        return context.once((self, "longest"), longest)

    def larger(self) -> Self | None:
        return type(self)(self.path) if self.limit else None

    def pick(self, samples: NDArray[np.float64]) -> NDArray[np.float64]:
        return samples[evenly(self.limit, len(samples))]

    def reading(self, decoder: Decoder, context: Context) -> Reading | None:
        items = context.once(self, self.items)
        if items[0].answers:
            return None

        def lay_out() -> Choices:
            pairs = [(first, self.delimiter + second) for item in items for first, second in item.alternatives]

            def weights(length: Callable[[str], int]) -> np.ndarray:
                # The space that stands before a continuation is not counted.
                return np.array([max(1, length(text[len(self.delimiter) :])) for _, text in pairs], np.float64)

            return Choices(
                tokenised(context.tokenizer, pairs),
                count=np.array([len(item.alternatives) for item in items]),
                lengths={title: weights(length) for title, length in self.lengths().items()},
                gold=np.array([item.gold for item in items]),
                longest=decoder.shape.max_context,
                device=decoder.device,
            )

        return context.once((self, decoder.shape.max_context, decoder.device), lay_out)

    def measures(self, decoder: Decoder, context: Context) -> dict[str, Tensor]:
        items = context.once(self, self.items)
        if not items[0].answers:
            return super().measures(decoder, context)
        return {self.title: self._written(items, decoder, context)}

    def _written(self, items: list[SuiteItem], decoder: Decoder, context: Context) -> Tensor:
        tokenizer, longest = context.tokenizer, decoder.shape.max_context - ANSWER_TOKENS
        ends = context.once("line ends", lambda: line_ends(tokenizer))
        queries = context.once((self, "queries"), lambda: encode_prompts(tokenizer, [item.query for item in items]))
        prompts = [ids[-longest:] or [tokenizer.prefix_id] for ids in queries]
        # Prompts of one length are read at once.
        order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), PROMPTS.of(decoder.device)
        hits = torch.zeros(len(items))
        for part in (order[start : start + size] for start in range(0, len(order), size)):
            lines = generate(decoder, [prompts[i] for i in part], max_new_tokens=ANSWER_TOKENS, eos_ids=ends)
            for i, line in zip(part, lines, strict=True):
                text = tokenizer.decode(line).lower()
                hits[i] = any(answer.lower() in text for answer in items[i].answers)
        return hits


@dataclass(frozen=True)
class MultipleChoice(Suite):
    """Choices as they are written."""

    name: ClassVar[str] = "mc"
    delimiter: ClassVar[str] = ""


@dataclass(frozen=True)
class PlainMultipleChoice(MultipleChoice):
    """Without length normalisation."""

    name: ClassVar[str] = "mc-plain"

    def lengths(self) -> dict[str, Callable[[str], int]]:
        return {self.title: _one, f"{self.title}.bytes": _bytes, f"{self.title}.characters": len}


def _bytes(text: str) -> int:
    return len(text.encode())


def _one(text: str) -> int:
    return 1


def line_ends(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a line: those with a newline in them, and those that end a text."""
    broken = [number for number in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([number])]
    return sorted({*broken, *tokenizer.eos_ids})


for _task in (Suite, MultipleChoice, PlainMultipleChoice):
    TASKS.register(_task.name, _task)
