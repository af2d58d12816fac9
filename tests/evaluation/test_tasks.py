"""The tasks themselves: what they ask, and that a model that knows the answer gets the point."""

import json
import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.core.errors import UserError
from nasbench.data.packing import Corpus
from nasbench.evaluation.reading import Ends, Text, read_alone
from nasbench.evaluation.retrieval import make_items
from nasbench.evaluation.suite import Choices, read_items, tokenised
from nasbench.evaluation.tasks import Context, parse_task, parse_tasks


@pytest.fixture
def context(tiny_model, text_file):
    loaded = load_model(str(tiny_model))
    return Context(loaded.tokenizer, Corpus.load(str(text_file), loaded.tokenizer, 32), loaded.decoder)


def write_questions(path, questions):
    path.write_text("\n".join(json.dumps(question) for question in questions))
    return path


def test_log_likelihoods_equal_one_by_one(context):
    torch.manual_seed(0)
    pairs = [
        (torch.randint(256, (n,)).tolist(), torch.randint(256, (m,)).tolist()) for n, m in [(5, 3), (40, 1), (2, 9)]
    ]
    ends = Ends([Text(prefix + tail, len(tail)) for prefix, tail in pairs], 512, context.teacher.device)
    together = ends.sums(read_alone(context.teacher, ends)["log_p"].numpy())
    for (prefix, tail), value in zip(pairs, together, strict=True):
        log_p = F.log_softmax(context.teacher(torch.tensor([prefix + tail]))[0], -1)
        expected = sum(float(log_p.detach()[len(prefix) + i - 1, token]) for i, token in enumerate(tail))
        assert value == pytest.approx(expected, rel=1e-4)


def test_length_normalisation_changes_the_answer(context, tmp_path, monkeypatch):
    questions = [{"query": "q", "choices": [" a", " bbbbbbbb"], "gold": 1}]
    path = write_questions(tmp_path / "q.jsonl", questions)
    monkeypatch.setattr(Choices, "sums", lambda self, log_p: np.array([-4.0, -9.0]))
    assert parse_task(f"mc:{path}").score(context.teacher, context).value == 1.0
    assert parse_task(f"mc-plain:{path}").score(context.teacher, context).value == 0.0


def test_multiple_choice_prefers_what_the_model_would_write(context, tmp_path):
    tokens = context.tokenizer.encode("the layer holds")
    greedy = int(context.teacher(torch.tensor([tokens]))[0, -1, :128].argmax())
    best = context.tokenizer.decode([greedy])
    other = next(c for c in "xyz" if c != best)
    questions = [{"query": "the layer holds", "choices": [other, best], "gold": gold} for gold in (1, 1, 0)]
    path = write_questions(tmp_path / "q.jsonl", questions)
    score = parse_task(f"mc:{path}").score(context.teacher, context)
    assert score.value == pytest.approx(2 / 3)
    assert score.n == 3


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"query": "q", "choices": ["a", "b"]}',
        '{"query": "q", "choices": ["a", "b"], "gold": 2}',
        '{"query": "q", "choices": ["a"], "gold": 0}',
        '{"query": "q", "choices": ["a", ""], "gold": 0}',
        '{"query": 3, "choices": ["a", "b"], "gold": 0}',
        "[]",
    ],
)
def test_bad_questions_name_the_line(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"q\.jsonl:2"):
        read_items(path)


@pytest.mark.parametrize("length", [96, 512, 1000])
def test_retrieval_items_fill_the_length_and_hold_the_answer(context, length):
    items = make_items(context, length, 6)
    assert items == make_items(context, length, 6)
    assert len({tuple(item.prompt) for item in items}) == 6
    for item in items:
        size = len(item.prompt) + len(item.answer)
        assert size == length or (length == 96 and size >= length)
        text, answer = context.tokenizer.decode(item.prompt), context.tokenizer.decode(item.answer)
        name = text.rsplit("of ", 1)[1].removesuffix(" is")
        assert f"The secret number of {name} is{answer}." in text


def test_retrieval_counts_whole_answers_only(context):
    task = parse_task("retrieval@200:3")
    items = make_items(context, 200, 3)

    class Oracle:
        """Knows the first item's answer, and all but the last token of the second's."""

        shape, device = context.teacher.shape, torch.device("cpu")

        def hidden_by_layer(self, tokens, documents=None):
            said = torch.zeros_like(tokens)
            for row, ids in zip(said, tokens.tolist(), strict=True):
                which = next(i for i, item in enumerate(items) if ids[: len(item.prompt)] == item.prompt)
                if which < 2:
                    row[:-1] = torch.tensor(ids[1:])
                if which == 1:
                    row[len(items[1].prompt) + len(items[1].answer) - 2] = 0
            return F.one_hot(said, 256).float()

        def logits(self, hidden):
            return hidden

    score = task.score(Oracle(), context)
    assert (score.value, score.n) == (pytest.approx(1 / 3), 3)


def test_retrieval_asks_of_the_split_that_it_is_asked_of(context):
    """Other questions over other text, laid out once each; and the store tells them apart."""
    task, (test, search) = (
        parse_task("retrieval@200:3"),
        [replace(context, split=split) for split in ("test", "search")],
    )
    laid_out = [task.reading(context.teacher, each) for each in (test, search, test)]
    assert laid_out[0] is laid_out[2]
    tokens = [torch.cat([batch.tokens.flatten() for batch in ends.batches]) for ends in laid_out]
    assert not torch.equal(tokens[0], tokens[1])
    assert task.settings(test) != task.settings(search)
    answers = [[item.answer for item in make_items(each, 200, 8)] for each in (test, search)]
    assert answers[0] != answers[1]


def test_retrieval_kl_is_the_divergence_over_the_answers(context):
    task, other = parse_task("retrieval-kl@96:3"), random_decoder(context.teacher.shape, ("A", "J", "W8", "J"), seed=3)
    expected = []
    for item in make_items(context, 96, 3):
        ids = torch.tensor([item.prompt + item.answer])
        with torch.no_grad():
            said = [torch.log_softmax(m(ids)[0, -len(item.answer) - 1 : -1], -1) for m in (context.teacher, other)]
        expected.append(float((said[0].exp() * (said[0] - said[1])).sum(-1).mean()))
    assert task.score(other, context).samples == pytest.approx(expected, rel=1e-4)
    assert task.score(context.teacher, context).value == pytest.approx(0, abs=1e-6)


def test_loss_and_kl_of_the_teacher(context):
    context = replace(context, corpus=context.corpus.without_documents())
    tokens = context.corpus.test
    expected = F.cross_entropy(context.teacher(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert parse_task("loss").score(context.teacher, context).value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert parse_task("kl").score(context.teacher, context).value == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="needs a teacher"):
        parse_task("kl").score(context.teacher, Context(context.tokenizer, context.corpus, None))


def test_task_names():
    assert [task.label for task in parse_tasks("loss,kl, retrieval@1024,mc:a.jsonl,loss")] == [
        "loss",
        "kl",
        "retrieval@1k",
        "mc:a.jsonl",
    ]
    for text, message in [
        ("los", "did you mean 'loss'"),
        ("loss@5", "takes no arguments"),
        ("retrieval@x", "bad size"),
        ("retrieval@8", "at least"),
        ("retrieval@512:x", "number of items"),
        ("mc", "mc:FILE.jsonl"),
        (" ,", "no task"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_tasks(text)


def test_scores_of_samples():
    score = parse_task("retrieval@512").scores(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert (score.value, score.n, score.cost, score.metric) == (0.75, 4, 0.25, "accuracy")
    assert score.stderr == pytest.approx(0.25)
    score = parse_task("loss").scores(torch.tensor([1.5]))
    assert score.cost == 1.5
    assert math.isnan(score.stderr)


def test_white_space_before_a_choice_is_the_choices(context, tmp_path):
    """As in lm-evaluation-harness: what stands at the end of the query moves into the choice, for every form."""
    said = tokenised(context.tokenizer, [("holds a ", "key"), ("holds a", " key"), ("holds a \n", "key"), ("", "key")])
    text = [(context.tokenizer.decode(first), context.tokenizer.decode(second)) for first, second in said[:3]]
    assert text == [("holds a", " key"), ("holds a", " key"), ("holds a", " \nkey")]
    assert said[3] == ([context.tokenizer.eos_id], context.tokenizer.encode("key"))
    merged = Merges()
    (pair,) = tokenised(merged, [("a ", "b")])
    assert pair == ([1], [23])
    found = []
    for query, choices in (("the layer holds ", ["key", "state"]), ("the layer holds", [" key", " state"])):
        path = write_questions(tmp_path / "q.jsonl", [{"query": query, "choices": choices, "gold": 0}])
        found.append(parse_task(f"mc-plain:{path}").reading(context.teacher, replace(context, memo={})))
    path = write_questions(tmp_path / "q.jsonl", [{"query": "the layer holds", "choices": ["key", "state"], "gold": 0}])
    found.append(parse_task(f"suite:{path}").reading(context.teacher, replace(context, memo={})))
    for ends in found:
        assert ends.counts.tolist() == [4, 6]
        assert all(map(torch.equal, [b.tokens for b in ends.batches], [b.tokens for b in found[0].batches]))


class Merges:
    """A tokenizer that joins a letter with the space before it."""

    eos_id, bos_id = 0, None
    words = types.MappingProxyType({"a": [1], "a ": [1, 9], "a b": [1, 23], "b": [2], " b": [23]})

    def encode_batch(self, texts):
        return [self.words[text] for text in texts]
