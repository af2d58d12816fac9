"""Texts of the RULER-style suite: as long as asked, with the answer in them; scores value by value."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import UserError
from nasbench.data.packing import Corpus
from nasbench.evaluation.reading import read_alone
from nasbench.evaluation.ruler import CHAIN, KINDS, make_item
from nasbench.evaluation.tasks import Context, parse_task


@pytest.fixture
def context(tiny_model, text_file):
    loaded = load_model(str(tiny_model))
    return Context(loaded.tokenizer, Corpus.load(str(text_file), loaded.tokenizer, 32), loaded.decoder)


def items(context, kind, length, count=8):
    rows = context.corpus.held_out("test").tokens.numpy()
    return [make_item(context.tokenizer, rows, kind, length, random.Random(f"{kind}{i}")) for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [256, 2000, 20_000])
def test_items_fill_the_length_and_hold_the_answer(context, kind, length):
    """Answers are read out of the text by rule."""
    found = items(context, kind, length)
    assert found == items(context, kind, length)
    assert len({tuple(item.prompt) for item in found}) == len(found)
    for item in found:
        size = len(item.prompt) + len(item.answer)
        assert length - 120 < size <= length
        text, said = context.tokenizer.decode(item.prompt), context.tokenizer.decode(item.answer)
        assert said == solve(kind, text)
        assert max(item.owner) + 1 == (CHAIN if kind == "variables" else 1)
        assert len(item.owner) == len(item.answer)


def solve(kind, text):
    body, question = text.rsplit("\n", 1)
    if kind in ("single", "multikey"):
        who = re.fullmatch(r"The locker number of (.*) is", question)[1]
        return " " + re.search(rf"The locker number of {who} is (\d+)\.", body)[1]
    if kind == "documents":
        body = body.rsplit("\n", 1)[0]
        who = re.search(r"Answer: (.*) lives in", question)[1]
        return " " + re.search(rf": {who} was born in .* and lives in (\w+)\.", body)[1]
    if kind == "words":
        words = body.split()
        return " " + max(set(words), key=words.count)
    (number,) = re.findall(r"\d{5}", question)
    chain = [number]
    for name, value in re.findall(r"VAR (\w+) = (\w+)", body):
        chain += [name] if value in chain else []
    return " " + ", ".join(chain[1:])


def test_facts_stand_at_all_depths(context):
    places = [item.prompt for item in items(context, "single", 2000, 40)]
    depths = [context.tokenizer.decode(ids).index("The locker number") / 2000 for ids in places]
    assert min(depths) < 0.2
    assert max(depths) > 0.7


def test_each_value_counts(context):
    """An oracle that knows all values but the second of each chain, and writes another thing between values."""
    context = replace(context, memo={})
    task = parse_task("ruler@300:variables:3")
    ends = task.reading(context.teacher, context)
    assert task.label == task.title == "ruler@300:variables:3"
    right = np.concatenate([np.array(item.owner) != 1 for item in ends.items])
    right[np.concatenate(list(ends_between(ends)))] = False
    assert ends.judge(np.zeros(len(right)), right)[task.title].tolist() == [(CHAIN - 1) / CHAIN] * 3


def ends_between(ends):
    start = 0
    for item in ends.items:
        yield start + np.flatnonzero(np.array(item.owner) == -1)
        start += len(item.owner)


def test_all_kinds_together_and_each_beside(context):
    task = parse_task("ruler@256:2")
    found = task.measures(context.teacher, context)
    assert list(found) == ["ruler@256:2", *(f"ruler@256:2.{kind}" for kind in KINDS)]
    assert [len(values) for values in found.values()] == [10, 2, 2, 2, 2, 2]
    assert torch.equal(found["ruler@256:2"][2:4], found["ruler@256:2.multikey"])
    assert task.scored_tokens(context) == 256
    alone = parse_task("ruler@256:multikey:2").measures(context.teacher, context)
    assert torch.equal(alone["ruler@256:multikey:2"], found["ruler@256:2.multikey"])


def test_a_text_begins_with_the_begin_token(context):
    task, plain = parse_task("ruler@256:1"), read_tokens(context)
    begun = replace(context, tokenizer=replace(context.tokenizer, bos_id=7), memo={})
    assert all(row[0] == 7 and len(row) <= 256 for row in read_tokens(begun))
    assert task.settings(begun) != task.settings(context)
    assert not any(row[0] == 7 for row in plain)


def read_tokens(context):
    reading = parse_task("ruler@256:1").reading(context.teacher, replace(context, memo={}))
    read_alone(context.teacher, reading)
    return [row for batch in reading.batches for row in batch.tokens.tolist()]


def test_names():
    assert parse_task("ruler").label == "ruler@4k"
    assert parse_task("ruler@128k:words").label == "ruler@128k:words"
    assert parse_task("ruler@8k:64").label == "ruler@8k:64"
    for text, message in (
        ("ruler@8k:multikeys", "did you mean 'multikey'"),
        ("ruler@128", "at least 256"),
        ("ruler@8k:words:x", "number of items"),
    ):
        with pytest.raises(UserError, match=message):
            parse_task(text)
