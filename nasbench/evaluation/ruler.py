"""A suite with a length dial, after RULER (arXiv 2404.06654): what must be found is scored value by value.

    ruler@8k              all kinds together, and each beside it as ruler@8k.multikey
    ruler@8k:multikey     one kind; ruler@8k:multikey:64 of 64 questions, ruler@8k:64 of 64 of each kind

| kind | the text | the question |
|---|---|---|
| single | one fact in prose | its number |
| multikey | a fact for every 64 tokens of prose | the number of one |
| variables | chains of assignments in prose, each of a number | the variables of one chain |
| words | a list of words, one of them ten times as frequent as the others | that word |
| documents | short lives of many people | where one of them lives |

A value is right if greedy decoding writes it behind the question and the right values before it. A sample is the share
of an item's values that are right. Texts and questions are made here, from the split's own prose.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product
from string import ascii_uppercase
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError, unknown
from nasbench.core.sizes import format_size, is_count
from nasbench.evaluation.reading import Ends, Text
from nasbench.evaluation.retrieval import FACT_TOKENS, ITEMS, NAMES, Generated, begin, prose
from nasbench.evaluation.tasks import TASKS, Context

CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Paris", "Delhi", "Rome", "Tokyo", "Berlin", "Dublin", "Quito", "Athens",
    "Prague", "Havana", "Nairobi", "Seoul", "Vienna", "Warsaw", "Madrid", "Sydney",
)  # fmt: skip
TRADES = ("baker", "nurse", "pilot", "painter", "farmer", "lawyer", "singer", "tailor", "carpenter", "teacher")
FAMILIES = (
    "Stone", "Brook", "Hill", "Field", "Wood", "Marsh", "Lake", "Ford", "Rivers", "Winter", "Summers", "Young",
    "Fisher", "Miller", "Cook", "Mason", "Porter", "Carter", "Fox", "Swan",
)  # fmt: skip
WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orange", "pencil", "quarter", "ribbon", "saddle", "table", "umbrella", "valley",
    "window", "yellow",
)  # fmt: skip
CHAIN = 4
"""Variables that have one number."""
FREQUENT = 10
"""How many times as frequent the common word is."""
SHORTEST = 256
"""Tokens that every kind has room in."""


@dataclass(frozen=True)
class Question:
    """A text's pieces in order, as token ids; the question behind them; the values that answer it, in order.

    Attributes:
        filler: whether prose fills the text between the pieces; else as many pieces as fit are the text.
    """

    pieces: list[list[int]]
    asked: str
    values: list[str]
    filler: bool = True


Encode = Callable[[Sequence[str]], list[list[int]]]


def _people(generator: random.Random, count: int) -> list[str]:
    names = [f"{first} {letter}. {family}" for first, letter, family in product(NAMES, ascii_uppercase, FAMILIES)]
    return generator.sample(names, min(count, len(names)))


def single(encode: Encode, generator: random.Random, length: int, count: int = 1) -> Question:
    people = _people(generator, count)
    numbers = [str(generator.randrange(10_000, 100_000)) for _ in people]
    facts = encode([f"\nThe locker number of {who} is {n}.\n" for who, n in zip(people, numbers, strict=True)])
    chosen = generator.randrange(len(people))
    return Question(facts, f"\nThe locker number of {people[chosen]} is", [numbers[chosen]])


def multikey(encode: Encode, generator: random.Random, length: int) -> Question:
    return single(encode, generator, length, max(2, length // FACT_TOKENS))


def variables(encode: Encode, generator: random.Random, length: int) -> Question:
    letters = [f"{a}{b}" for a, b in product(ascii_uppercase, repeat=2)]
    chains = max(2, min(length // (4 * FACT_TOKENS), len(letters) // CHAIN))
    names = generator.sample(letters, chains * CHAIN)
    numbers = generator.sample(range(10_000, 100_000), chains)
    # The first lines of all chains, then their second ones, and so on: each assigns the variable of the one before.
    lines = [
        f"\nVAR {names[chain * CHAIN + step]} = {names[chain * CHAIN + step - 1] if step else numbers[chain]}\n"
        for step, chain in product(range(CHAIN), range(chains))
    ]
    chosen = generator.randrange(chains)
    asked = f"\nThe {CHAIN} variables that have the value {numbers[chosen]}, in order, are VAR"
    return Question(encode(lines), asked, names[chosen * CHAIN : (chosen + 1) * CHAIN])


def words(encode: Encode, generator: random.Random, length: int) -> Question:
    order = generator.sample(WORDS, len(WORDS))
    ids = dict(zip(order, encode([f" {word}" for word in order]), strict=True))
    drawn = generator.choices(order, [FREQUENT] + [1] * (len(order) - 1), k=length)
    return Question(
        [ids[word] for word in drawn], "\nOf these words the most frequent is the word", order[:1], filler=False
    )


def documents(encode: Encode, generator: random.Random, length: int) -> Question:
    people = _people(generator, max(2, length // 24))
    homes = [generator.choice(CITIES) for _ in people]
    lives = encode(
        [
            f"\nDocument {number}: {who} was born in {generator.choice(CITIES)}, became a "
            f"{generator.choice(TRADES)} and lives in {home}.\n"
            for number, (who, home) in enumerate(zip(people, homes, strict=True), 1)
        ]
    )
    asked = [f"\nQuestion: in which city does {who} live?\nAnswer: {who} lives in" for who in people]
    room = length - 2 * len(encode(asked[:1])[0])
    chosen = generator.randrange(max(1, int(np.cumsum([len(life) for life in lives]).searchsorted(room, "right"))))
    return Question(lives, asked[chosen], [homes[chosen]], filler=False)


KINDS = {kind.__name__: kind for kind in (single, multikey, variables, words, documents)}


@dataclass(frozen=True)
class Item:
    """Token ids of text and question, then of the answer.

    Attributes:
        owner: for each token of the answer the number of its value; -1 for what stands between two values.
    """

    prompt: list[int]
    answer: list[int]
    owner: list[int]


def make_item(tokenizer: Tokenizer, rows: np.ndarray, kind: str, length: int, generator: random.Random) -> Item:
    """One item of at most `length` tokens, prose of `rows` [n, T] included."""
    question = KINDS[kind](tokenizer.encode_batch, generator, length)
    asked, comma, *values = tokenizer.encode_batch([question.asked, ",", *(f" {value}" for value in question.values)])
    answer: list[int] = []
    owner: list[int] = []
    for number, value in enumerate(values):
        answer += (comma if number else []) + value
        owner += [-1] * (len(comma) if number else 0) + [number] * len(value)
    room = length - len(asked) - len(answer)
    if not question.filler:
        fits = int(np.cumsum([len(piece) for piece in question.pieces]).searchsorted(room, "right"))
        return Item([*chain.from_iterable(question.pieces[:fits]), *asked], answer, owner)
    room = max(0, room - sum(map(len, question.pieces)))
    cuts = [0, *sorted(generator.randrange(room + 1) for _ in question.pieces), room]
    text: list[int] = []
    for piece, (start, end) in zip([*question.pieces, []], pairwise(cuts), strict=True):
        text += prose(rows, end - start, generator) + piece
    return Item(text + asked, answer, owner)


class ValueEnds(Ends):
    """Answers of several values, `each` of every kind."""

    def __init__(
        self,
        items: Sequence[Item],
        first: list[int],
        longest: int,
        device: torch.device,
        kinds: Sequence[str],
        title: str,
    ) -> None:
        texts = [Text(first + item.prompt + item.answer, len(item.answer)) for item in items]
        super().__init__(texts, longest, device, title=title)
        self.items, self.kinds = items, kinds

    def judge(self, log_p: np.ndarray, right: np.ndarray) -> dict[str, Tensor]:
        shares = []
        for item, found in zip(self.items, np.split(right, np.cumsum(self.counts)[:-1]), strict=True):
            owner = np.array(item.owner)
            shares.append(np.mean([found[owner == number].all() for number in range(owner.max() + 1)]))
        all_kinds = torch.tensor(shares, dtype=torch.float32)
        each = dict(zip(self.kinds, all_kinds.split(len(shares) // len(self.kinds)), strict=True))
        beside = {f"{self.title}.{kind}": part for kind, part in each.items()}
        return {self.title: all_kinds} | (beside if len(self.kinds) > 1 else {})


@dataclass(frozen=True)
class Ruler(Generated):
    """Share of right values.

    Attributes:
        kind: of the questions, "" for as many of each.
    """

    length: int = 4096
    kind: str = ""
    name: ClassVar[str] = "ruler"

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        kind, _, count = argument.partition(":") if not is_count(argument) else ("", "", argument)
        if kind and kind not in KINDS:
            raise unknown(f"kind of task {cls.name}", kind, KINDS)
        task = replace(super().parse(length, count), kind=kind)
        if task.length < SHORTEST:
            raise UserError(f"task {task.label}: at least {SHORTEST} tokens")
        return task

    @property
    def label(self) -> str:
        kind = f":{self.kind}" if self.kind else ""
        return f"{self.name}@{format_size(self.length)}{kind}" + (f":{self.items}" if self.items != ITEMS else "")

    def settings(self, context: Context) -> str:
        return f"v1/{context.split}/{self.items}/{context.corpus.fingerprint[:8]}/{len(begin(context))}"

    def lay_out(self, longest: int, device: torch.device, context: Context) -> ValueEnds:
        rows, first = context.corpus.held_out(context.split).tokens.numpy(), begin(context)
        kinds = [self.kind] if self.kind else list(KINDS)
        items = [
            make_item(
                context.tokenizer, rows, kind, self.length - len(first),
                random.Random(f"{context.split}/{kind}/{index}/{self.length}"),
            )
            for kind in kinds
            for index in range(self.items)
        ]  # fmt: skip
        return ValueEnds(items, first, longest, device, kinds, self.title)


TASKS.register(Ruler.name, Ruler)
