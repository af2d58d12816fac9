"""The evaluator: shared prefixes give the same numbers, and nothing is measured twice."""

import copy
import json
import math
import random
from dataclasses import replace

import pytest
import torch

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import MachineError, UserError
from nasbench.core.tables import read_table
from nasbench.data.packing import Corpus
from nasbench.evaluation.evaluator import Evaluator, score_checkpoint
from nasbench.evaluation.importance import Importance, importance_path, layer_importance
from nasbench.evaluation.scores import ScoreStore
from nasbench.evaluation.tasks import Context, HeldOutLoss, parse_task
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill


@pytest.fixture
def evaluator(make_run):
    run = make_run(names=("A", "W8", "J"))
    distill(run, DistillConfig(ridge_tokens=512, align_tokens=0, supernet_tokens=0), dtype=torch.float32)
    return Evaluator.open(run, dtype=torch.float32, search_tokens=256, test_tokens=512)


def everything(space):
    generator = random.Random(0)
    return [space.original, *(tuple(generator.choice(names) for names in space.choices) for _ in range(12))]


def test_shared_prefixes_give_what_single_forwards_give(evaluator):
    evaluator.corpus = evaluator.corpus.without_documents()
    placements = everything(evaluator.supernet.space)
    together = evaluator.measure(placements, "test")
    tokens = evaluator.corpus.held_out("test", 512).tokens
    teacher = torch.log_softmax(evaluator.supernet.teacher(tokens)[:, :-1], -1)
    for placement, scores in zip(placements, together, strict=True):
        with torch.no_grad():
            log_p = torch.log_softmax(evaluator.supernet.select(placement)(tokens)[:, :-1], -1)
        per_sequence = -log_p.gather(-1, tokens[:, 1:, None])[..., 0].mean(1)
        assert scores["loss"].value == pytest.approx(float(per_sequence.mean()), rel=1e-5), placement
        assert scores["loss"].stderr == pytest.approx(float(per_sequence.std()) / math.sqrt(len(tokens)), rel=1e-4)
        assert scores["loss"].n == len(tokens) == 16
        kl = (teacher.exp() * (teacher - log_p)).sum(-1).mean()
        assert scores["kl"].value == pytest.approx(float(kl), rel=1e-4, abs=1e-6), placement
    assert together[0]["kl"].value == pytest.approx(0, abs=1e-6)


def test_losses_are_those_of_the_documents_alone(evaluator):
    """Of a corpus whose held-out rows hold several documents each."""
    tokens = evaluator.corpus.held_out("test", 512).tokens
    ages = torch.stack([torch.cat((torch.arange(5), torch.arange(20), torch.arange(7)))] * len(tokens)).int()
    evaluator.corpus.ages["test"] = ages
    placement = ("J", "A", "W8", "J")
    decoder = evaluator.supernet.select(placement)
    total = []
    for row in tokens:
        parts = [row[:5], row[5:25], row[25:]]
        losses = []
        for part in parts:
            with torch.no_grad():
                log_p = torch.log_softmax(decoder(part[None])[0, :-1], -1)
            losses.append(-log_p.gather(-1, part[1:, None])[:, 0])
        total.append(torch.cat(losses).mean())
    measured = evaluator.measure([placement], "test")[0]["loss"]
    assert measured.value == pytest.approx(float(torch.stack(total).mean()), rel=1e-5)
    assert any(key.settings.endswith("/apart") for key in evaluator.store.find(task="loss"))
    task = evaluator.scores(placement, ["loss"])["loss"]
    assert task.value == measured.value
    alone = HeldOutLoss().score(decoder, evaluator.context("test"))
    assert alone.value == pytest.approx(measured.value, rel=1e-5)


def losses(evaluator, placements, split="search"):
    return [scores["loss"].value for scores in evaluator.measure(placements, split)]


def test_losses_keep_the_order_asked_and_splits_differ(evaluator):
    placements = everything(evaluator.supernet.space)[::-1]
    search = losses(evaluator, placements)
    assert search == [losses(evaluator, [placement])[0] for placement in placements]
    assert search[-1] != losses(evaluator, placements, "test")[-1]
    with pytest.raises(UserError, match="layer 0"):
        losses(evaluator, [("G", "A", "A", "A")])


@pytest.mark.parametrize("task", ["retrieval@96:3", "retrieval-kl@96:3", "agreement@6"])
def test_placements_of_any_task_share_prefixes(evaluator, task):
    placements = everything(evaluator.supernet.space)[:5]
    context, parsed = evaluator.context("search"), parse_task(task)
    together = evaluator.measure(placements, tasks=[task])
    for placement, scores in zip(placements, together, strict=True):
        alone = parsed.score(evaluator.supernet.select(placement), context)
        assert scores[task].samples == pytest.approx(alone.samples, rel=1e-3, abs=1e-5)
        assert evaluator.store.get(evaluator.key(placement, parsed, context)) == scores[task]


def test_scores_of_other_settings_are_other_scores(evaluator, make_run):
    """More text, other rows, another split and another dtype are measured anew; the same is not."""
    placement, first = ("J", "A", "W8", "J"), evaluator
    seen = {first.key(placement, HeldOutLoss(), first.context(split)) for split in ("search", "test")}
    first.measure([placement])
    more = Evaluator(first.run, first.supernet, first.corpus, search_tokens=512)
    assert more.measure([placement])[0]["loss"].n == 2 * first.measure([placement])[0]["loss"].n
    seen.add(more.key(placement, HeldOutLoss(), more.context("search")))
    bf16 = Evaluator.open(first.run, dtype=torch.bfloat16, search_tokens=256)
    seen.add(bf16.key(placement, HeldOutLoss(), bf16.context("search")))
    longer = Corpus.load(first.run.spec.data, first.supernet.tokenizer, 64)
    longer = Evaluator(first.run, first.supernet, longer, search_tokens=256)
    seen.add(longer.key(placement, HeldOutLoss(), longer.context("search")))
    assert len(seen) == 5


def test_a_score_that_is_not_finite_is_an_error_and_not_written(evaluator):
    placement = ("J", "A", "W8", "J")
    with torch.no_grad():
        next(evaluator.supernet.mixer(0, "J").parameters()).fill_(math.nan)
    with pytest.raises(MachineError, match=r"task loss of J A W8 J: 8 of 8 samples are not finite"):
        evaluator.measure([placement])
    assert not evaluator.store.find()
    assert evaluator.measure([("A", "A", "W8", "J")])[0]["loss"].value > 0


def test_few_items_of_a_benchmark_come_out_of_all(evaluator, tmp_path, monkeypatch):
    items = [{"query": f"the {word}", "choices": ["layer", "state"], "gold": i % 2} for i, word in enumerate("abcdef")]
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    placement = ("J", "A", "W8", "J")
    whole = evaluator.scores(placement, [f"suite:{path}"])[f"suite:{path}"]
    monkeypatch.setattr(evaluator.layers, "hidden", lambda *_: pytest.fail("measured again"))
    few = evaluator.scores(placement, [f"suite@3:{path}"])[f"suite@3:{path}"]
    assert few.samples.tolist() == whole.samples[::2].tolist()


def test_nothing_is_measured_twice(evaluator, monkeypatch):
    placements = everything(evaluator.supernet.space)
    calls = []
    first = evaluator.measure(placements, "search", lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(set(placements)), len(set(placements)))
    again = Evaluator(evaluator.run, evaluator.supernet, evaluator.corpus, search_tokens=256)
    monkeypatch.setattr(again.layers, "hidden", lambda *_: pytest.fail("measured again"))
    for old, new in zip(first, again.measure(placements), strict=True):
        assert new["loss"].value == pytest.approx(old["loss"].value, rel=1e-8)
    again.supernet.version = "other"
    with pytest.raises(pytest.fail.Exception):
        again.measure(placements[:1])


def test_scores_of_tasks_are_cached(evaluator, monkeypatch):
    placement = ("J", "A", "W8", "A")
    first = evaluator.scores(placement, ["loss", "kl", "retrieval@160:4"])
    assert list(first) == ["loss", "kl", "retrieval@160:4"]
    assert 0 <= first["retrieval@160:4"].value <= 1
    monkeypatch.setattr(evaluator.supernet, "select", lambda _: pytest.fail("measured again"))
    monkeypatch.setattr(evaluator.layers, "hidden", lambda *_: pytest.fail("measured again"))
    assert evaluator.scores(placement, ["loss", "kl", "retrieval@160:4"]) == first


def test_importance_is_the_loss_of_single_replacements(evaluator):
    rows = layer_importance(evaluator)
    assert [(row.layer, row.name) for row in rows] == [(layer, name) for layer in range(4) for name in ("W8", "J")]
    base, alone = losses(evaluator, [evaluator.supernet.space.original, ("A", "A", "J", "A")])
    assert rows[5].loss_increase == pytest.approx(alone - base)
    assert all(row.kl > 0 for row in rows)
    read = read_table(importance_path(evaluator.run.path), Importance)
    assert [row.loss_increase for row in read] == pytest.approx([row.loss_increase for row in rows], abs=1e-6)


def test_scores_of_a_checkpoint_are_kept_where_asked(tiny_model, text_file, tmp_path, monkeypatch):
    loaded = load_model(str(tiny_model))
    context = Context(loaded.tokenizer, Corpus.load(str(text_file), loaded.tokenizer, 32), None)
    tasks = [parse_task("loss"), parse_task("retrieval@96:3")]
    first = score_checkpoint(loaded.decoder, tasks, context, tmp_path / "scores")
    assert {key.task for key in ScoreStore(tmp_path / "scores").find()} == {"loss", "retrieval@96:3"}
    monkeypatch.setattr(HeldOutLoss, "measures", lambda *_: pytest.fail("measured again"))
    assert score_checkpoint(loaded.decoder, tasks, context, tmp_path / "scores") == first
    other = copy.deepcopy(loaded.decoder)
    with torch.no_grad():
        other.layers[0].self_attn.q_proj.weight[0, 0] += 1
    moved = copy.deepcopy(loaded.decoder)
    moved.model.embed_tokens.weight.data = moved.model.embed_tokens.weight.flip(0)
    scaled = copy.deepcopy(loaded.decoder)
    scaled.shape = replace(scaled.shape, rope_scaling=("linear", 2.0))
    words = replace(context, tokenizer=replace(context.tokenizer, eos_ids=(7,)), memo={})
    for decoder, settings in ((other, context), (moved, context), (scaled, context), (loaded.decoder, words)):
        with pytest.raises(pytest.fail.Exception):
            score_checkpoint(decoder, tasks, settings, tmp_path / "scores")
