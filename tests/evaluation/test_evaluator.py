"""The evaluator: shared prefixes give the same numbers, nothing is measured twice, the file is whole."""

import math
import random
from multiprocessing import get_context

import pytest
import torch

from nasbench.core.errors import UserError
from nasbench.evaluation.evals_file import EvalsFile, Key, read_evals
from nasbench.evaluation.evaluator import Evaluator
from nasbench.evaluation.importance import importance_path, read_importance
from nasbench.evaluation.score import Score
from nasbench.evaluation.tasks import HeldOutLoss
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
    assert any(key.detail.endswith("/apart") for key in evaluator.cache.scores)
    task = evaluator.scores(placement, ["loss"])["loss"]
    assert task.value == measured.value
    assert HeldOutLoss().score(decoder, evaluator.context("test")).value == pytest.approx(measured.value, rel=1e-5)


def test_losses_keep_the_order_asked_and_splits_differ(evaluator):
    placements = everything(evaluator.supernet.space)[::-1]
    search = evaluator.losses(placements)
    assert [score.value for score in search] == [evaluator.losses([placement])[0].value for placement in placements]
    assert search[-1].value != evaluator.losses(placements, "test")[-1].value
    with pytest.raises(UserError, match="layer 0"):
        evaluator.losses([("G", "A", "A", "A")])


def test_nothing_is_measured_twice(evaluator, monkeypatch):
    placements = everything(evaluator.supernet.space)
    calls = []
    first = evaluator.measure(placements, "search", lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(set(placements)), len(set(placements)))
    again = Evaluator(evaluator.run, evaluator.supernet, evaluator.corpus, search_tokens=256)
    monkeypatch.setattr(again, "_shared_prefixes", lambda *_: pytest.fail("measured again"))
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
    assert evaluator.scores(placement, ["loss", "kl", "retrieval@160:4"]) == first


def test_importance_is_the_loss_of_single_replacements(evaluator):
    rows = evaluator.importance()
    assert [(row.layer, row.name) for row in rows] == [(layer, name) for layer in range(4) for name in ("W8", "J")]
    base = evaluator.losses([evaluator.supernet.space.original])[0].value
    alone = evaluator.losses([("A", "A", "J", "A")])[0].value
    assert rows[5].loss_increase == pytest.approx(alone - base)
    assert all(row.kl > 0 for row in rows)
    read = read_importance(importance_path(evaluator.run.path))
    assert [row.loss_increase for row in read] == pytest.approx([row.loss_increase for row in rows], rel=1e-4)
    importance_path(evaluator.run.path).write_text("layer,name,loss_increase,loss_stderr,kl\n1,J,x,0,0\n")
    with pytest.raises(UserError, match=r"importance\.csv:2: column loss_increase: bad number 'x'"):
        read_importance(importance_path(evaluator.run.path))


def _add(path, worker):
    for index in range(10):
        file = EvalsFile(path)
        key = Key("4A", f"t{worker}-{index}", "d", "v", "float32")
        file.merge({key: Score(key.task, "nats", 1.5, 0.1, 4, False)})


def test_two_writers_lose_nothing(tmp_path):
    context = get_context("spawn")
    workers = [context.Process(target=_add, args=(tmp_path / "evals.csv", worker)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(read_evals(tmp_path / "evals.csv")) == 20


@pytest.mark.parametrize(
    ("column", "text"),
    [("value", "x"), ("value", "nan"), ("stderr", "-1"), ("n", "0"), ("higher_is_better", "yes"), ("placement", "4?")],
)
def test_bad_cells_are_reported_with_file_line_and_column(tmp_path, column, text):
    path = tmp_path / "evals.csv"
    EvalsFile(path).merge({Key("4A", "loss", "d", "v", "float32"): Score("loss", "nats", 1.5, math.nan, 1, False)})
    assert math.isnan(next(iter(read_evals(path).values())).stderr)
    header, row = path.read_text().splitlines()
    cells = row.split(",")
    cells[header.split(",").index(column)] = text
    path.write_text(f"{header}\n{','.join(cells)}\n")
    with pytest.raises(UserError, match=rf"evals\.csv:2: column {column}"):
        EvalsFile(path)


def test_short_rows_and_other_headers_are_refused(tmp_path):
    path = tmp_path / "evals.csv"
    path.write_text("a,b\n")
    with pytest.raises(UserError, match="header"):
        EvalsFile(path)
    EvalsFile(tmp_path / "new.csv").merge({Key("4A", "l", "d", "v", "f"): Score("l", "nats", 1, 1, 2, False)})
    path.write_text((tmp_path / "new.csv").read_text() + "4A,loss\n")
    with pytest.raises(UserError, match=r"evals\.csv:3: 2 cells"):
        EvalsFile(path)
