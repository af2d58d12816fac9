"""The benchmark's three forms, written lines, agreement with the teacher."""

import json
from dataclasses import replace

import pytest
import torch

from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import UserError
from nasbench.data.packing import Corpus
from nasbench.evaluation import suite
from nasbench.evaluation.suite import chance, line_ends, read_items
from nasbench.evaluation.tasks import Context, parse_task
from nasbench.spaces.placement import parse_placement


@pytest.fixture
def context(tiny_model, text_file):
    loaded = load_model(str(tiny_model))
    return Context(loaded.tokenizer, Corpus.load(str(text_file), loaded.tokenizer, 32), loaded.decoder)


def write(path, items):
    path.write_text("\n".join(json.dumps(item) for item in items))
    return path


def test_lengths_are_those_of_the_harness(context, tmp_path):
    """acc_bytes, acc and acc_norm: a two-byte letter is one character, the space before a choice is none."""
    path = write(tmp_path / "q.jsonl", [{"query": "q", "choices": ["é", "abc"], "gold": 0}])
    for name, titles in (("suite", ("", ".plain", ".characters")), ("mc-plain", (".bytes", "", ".characters"))):
        task = parse_task(f"{name}:{path}")
        lengths = task.reading(context.teacher, replace(context, memo={})).lengths
        assert list(lengths) == ["mc-plain:q", "mc-plain:q.bytes", "mc-plain:q.characters"] or name == "suite"
        found = [lengths[task.title + ending].tolist() for ending in titles]
        assert found == [[2, 3], [1, 1], [1, 3]]


def test_choices_and_prefixes(context, tmp_path):
    tokens = context.tokenizer.encode("the layer holds ")
    said = context.teacher(torch.tensor([tokens]))[0, -1]
    letter = {c: context.tokenizer.encode(c)[0] for c in "abcdefghijklmnopqrstuvwxyz"}
    other, best = sorted(letter, key=lambda c: float(said[letter[c]].detach()))[::25]
    choices = [{"query": "the layer holds", "choices": [other, best], "gold": gold} for gold in (1, 1, 0)]
    path = write(tmp_path / "choices.jsonl", choices)
    found = parse_task(f"suite:{path}").measures(context.teacher, context)
    assert list(found) == ["suite:choices", "suite:choices.plain", "suite:choices.characters"]
    assert [values.tolist() for values in found.values()] == [[1, 1, 0]] * 3
    assert chance(read_items(path)) == 0.5
    assert parse_task(f"suite@2:{path}").score(context.teacher, context).n == 2

    likely = {}
    for prefix in ("ab", "c"):
        tokens = context.tokenizer.encode(f"{prefix} x")
        log_p = torch.log_softmax(context.teacher(torch.tensor([tokens]))[0], -1).detach()
        likely[prefix] = float(log_p[-3, tokens[-2]] + log_p[-2, tokens[-1]])
    gold = 0 if likely["ab"] > likely["c"] else 1
    path = write(tmp_path / "p.jsonl", [{"prefixes": ["ab", "c"], "suffix": "x", "gold": gold}])
    assert parse_task(f"suite:{path}").score(context.teacher, context).value == 1


@pytest.mark.parametrize("size", [1, 32])
def test_a_written_line_holds_the_answer(context, tmp_path, monkeypatch, size):
    """Of prompts of several lengths in any order, one longer than the context leaves room for."""
    monkeypatch.setattr(suite, "PROMPTS", ByDevice(size))
    decoder = random_decoder(replace(context.teacher.shape, max_context=60), parse_placement("A J W8 J"), seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        decoder.model.embed_tokens.weight.normal_()
    queries = ["the state of a long query", "the state", "", "a window", "the state of a query that is too long for it"]
    lines = []
    for query in queries:
        ids = context.tokenizer.encode(query)[-36:] or [context.tokenizer.eos_id]
        for _ in range(24):
            with torch.inference_mode():
                ids = [*ids, int(decoder(torch.tensor([ids]))[0, -1].argmax())]
            if ids[-1] in line_ends(context.tokenizer):
                break
        lines.append(context.tokenizer.decode(ids[-24:]))
    answers = [[line[len(line) // 2 :].upper()] if i % 2 else ["nowhere"] for i, line in enumerate(lines)]
    items = [{"query": q, "answers": a} for q, a in zip(queries, answers, strict=True)]
    path = write(tmp_path / "written.jsonl", items)
    found = parse_task(f"suite:{path}").score(decoder, context).samples
    assert found.tolist() == [0, 1, 0, 1, 0]
    assert chance(read_items(path)) == 0


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"query": "q"}', '{"query": "q", "answers": []}', '{"query": "q", "answers": [""]}',
     '{"query": "q", "choices": ["a"], "gold": 0}', '{"query": "q", "choices": ["a", "b"], "gold": 2}',
     '{"prefixes": ["a", 1], "suffix": "s", "gold": 0}', '{"query": "q", "answers": ["a"]}'],
)  # fmt: skip
def test_bad_items_name_the_line(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"q\.jsonl:2"):
        read_items(path)


def test_agreement_of_the_teacher_and_of_another(context):
    task = parse_task("agreement@10")
    found = task.measures(context.teacher, context)
    assert all(float(values.mean()) == 1 for values in found.values())
    other = random_decoder(context.teacher.shape, parse_placement("4J"), seed=3)
    share, prefix = task.measures(other, context).values()
    assert 0 <= float(prefix.mean()) <= float(share.mean()) < 1
    with pytest.raises(UserError, match="number of tokens only"):
        parse_task("agreement@10:x")
