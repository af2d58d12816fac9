"""Scores that cannot tell: what is full attention on a short text is named, and only that."""

import json
import math

import pytest
import torch

from nasbench.checkpoints.load import load_model
from nasbench.data.packing import Corpus
from nasbench.evaluation.evaluator import IDENTICAL, Evaluator, scoring_corpus
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.runs import Run, RunSpec
from nasbench.spaces.placement import parse_placement
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.supernet import Supernet
from nasbench.supernet.train import distill


def test_a_placement_is_the_model_up_to_its_shortest_window():
    shape = MODELS["smollm2-135m"]
    assert shape.exact_until(parse_placement("30A")) == math.inf
    assert shape.exact_until(parse_placement("10A 10W256 10W512")) == 256
    assert shape.exact_until(parse_placement("29A J")) == 0
    # Where the model's own layers are windows, longer ones are the model up to its own.
    gemma = ModelSpec(
        "tiny", "gemma3_text", 4, 32, 48, 4, 2, 8, 256, 512, 1e4, 1e-6, published_placement="3W9 A",
        defaults=(("W", "9"),), window_rope_theta=500.0,
    )  # fmt: skip
    assert gemma.exact_until(parse_placement("3W9 A")) == math.inf
    assert gemma.exact_until(parse_placement("W12 2W9 W64")) == 9


@pytest.fixture
def evaluator(make_run):
    run = make_run(names=("A", "W8", "W32", "J"))
    distill(run, DistillConfig(ridge_tokens=512, align_tokens=0, supernet_tokens=0), dtype=torch.float32)
    net = Supernet.load(run, dtype=torch.float32)
    return Evaluator(run, net, Corpus.load(run.spec.data, net.tokenizer, 32), search_tokens=256, test_tokens=512)


def test_scores_name_placements_that_are_the_model(evaluator, caplog):
    evaluator.corpus = evaluator.corpus.without_documents()
    placements = [parse_placement(text) for text in ("4A", "4W32", "2A 2W32", "W8 3W32", "3W32 J")]
    found = evaluator.measure(placements, tasks=["kl"])
    assert [scores["kl"].about.get(IDENTICAL, False) for scores in found] == [False, True, True, False, False]
    assert "cannot tell these from the model itself: 2A 2W32, 4W32" in caplog.text
    assert found[1]["kl"].value == pytest.approx(0, abs=1e-6)
    # Longer texts tell.
    assert not evaluator.identical(placements, 33)
    # So do weights that were trained.
    with torch.no_grad():
        evaluator.supernet.mixer(2, "W32").o_proj.weight[0, 0] += 0.1
    assert evaluator.identical(placements, 32) == set()
    assert evaluator.identical([parse_placement("A W32 2A")], 32)


def test_tasks_say_how_long_their_texts_are(evaluator, tmp_path):
    from nasbench.evaluation.tasks import parse_task

    context = evaluator.context("test")
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"query": "ab", "choices": ["c", "defg"], "gold": 0}))
    assert parse_task(f"suite:{path}").scored_tokens(context) == len("ab defg")
    assert parse_task(f"mc:{path}").scored_tokens(context) == len("abdefg")
    path.write_text(json.dumps({"query": "abc", "answers": ["c"]}))
    (tmp_path / "w.jsonl").write_text(json.dumps({"query": "abc", "answers": ["c"]}))
    assert parse_task(f"suite:{tmp_path}/w.jsonl").scored_tokens(context) == 3 + 24


def test_rows_are_long_enough_to_tell_windows_apart(make_run, tiny_model, tmp_path):
    """Twice the largest window; as long as those of training where that is enough, or where the text is too short."""
    loaded = load_model(str(tiny_model))

    def rows(run):
        return scoring_corpus(run, loaded.shape, loaded.tokenizer).sequence

    assert rows(make_run("a", names=("A", "W8", "J"))) == 32
    assert rows(make_run("b", names=("A", "W8", "W40", "J"))) == 80
    assert rows(make_run("c", names=("A", "W400", "J"))) == loaded.shape.max_context == 512
    for characters, expected in ((100, 80), (60, 16)):
        text = tmp_path / f"{characters}.jsonl"
        lines = [json.dumps({"text": f"{i} the layer holds ".ljust(characters, "x")}) for i in range(10)]
        text.write_text("\n".join(lines))
        short = Run.create(tmp_path / f"{characters}", RunSpec(str(tiny_model), ("A", "W40"), 4, str(text), 16))
        assert rows(short) == expected
