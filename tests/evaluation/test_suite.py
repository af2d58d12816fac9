"""The benchmark's three forms, greedy lines without a cache, agreement with the teacher."""

import json

import pytest
import torch

from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.core.errors import UserError
from nasbench.data.packing import Corpus
from nasbench.evaluation.reading import greedy
from nasbench.evaluation.suite import chance, line_ends, read_items
from nasbench.evaluation.tasks import Context, parse_task
from nasbench.runtime.generate import generate
from nasbench.spaces.placement import parse_placement


@pytest.fixture
def context(tiny_model, text_file):
    loaded = load_model(str(tiny_model))
    return Context(loaded.tokenizer, Corpus.load(str(text_file), loaded.tokenizer, 32), loaded.decoder)


def write(path, items):
    path.write_text("\n".join(json.dumps(item) for item in items))
    return path


@pytest.mark.parametrize("placement", ["4A", "A J W8 J"])
def test_greedy_is_what_a_cache_gives(context, placement):
    decoder = random_decoder(context.teacher.shape, parse_placement(placement), seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        decoder.model.embed_tokens.weight.normal_()
    prompts = [torch.randint(256, (n,)).tolist() for n in (3, 40, 17, 17, 2)]
    for ends in ([], list(range(0, 256, 5))):
        expected = generate(decoder, prompts, max_new_tokens=12, eos_ids=ends)
        stops = torch.tensor(ends, dtype=torch.int64)
        assert greedy(decoder, prompts, 12, stops) == expected
        passes: list[int] = []
        assert greedy(decoder, prompts, 12, stops, expected, passes.append) == expected
        assert passes == [0]
        wrong = [torch.randint(256, (n,)).tolist() for n in (12, 0, 3, 1, 7)]
        assert greedy(decoder, prompts, 12, stops, wrong) == expected


def test_choices_and_prefixes(context, tmp_path):
    tokens = context.tokenizer.encode("the layer holds ")
    said = context.teacher(torch.tensor([tokens]))[0, -1]
    letter = {c: context.tokenizer.encode(c)[0] for c in "abcdefghijklmnopqrstuvwxyz"}
    other, best = sorted(letter, key=lambda c: float(said[letter[c]].detach()))[::25]
    choices = [{"query": "the layer holds", "choices": [other, best], "gold": gold} for gold in (1, 1, 0)]
    path = write(tmp_path / "choices.jsonl", choices)
    found = parse_task(f"suite:{path}").measures(context.teacher, context)
    assert [values.tolist() for values in found.values()] == [[1, 1, 0], [1, 1, 0]]
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


def test_a_written_line_holds_the_answer(context, tmp_path):
    line = greedy(context.teacher, [context.tokenizer.encode("the state")], 24, line_ends(context.tokenizer))[0]
    text = context.tokenizer.decode(line)
    assert len(text) > 1
    assert "\n" not in text
    items = [{"query": "the state", "answers": answers} for answers in (["nowhere", text[:4].upper()], ["nowhere"])]
    path = write(tmp_path / "written.jsonl", items)
    assert parse_task(f"suite:{path}").score(context.teacher, context).samples.tolist() == [1, 0]
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
