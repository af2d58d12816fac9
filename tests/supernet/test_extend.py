"""More tokens for a run that has had some: it goes on, and where it was stopped does not matter."""

import csv
import os
import signal
import threading

import pytest
import torch

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import UserError
from nasbench.supernet import checkpoint
from nasbench.supernet.finalize import MIXERS, final_folder, finalize, load_final
from nasbench.supernet.loop import Loop
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import Distiller, distill

CONFIG = DistillConfig(
    ridge_tokens=512, align_tokens=512, supernet_tokens=512, align_batch_tokens=128, supernet_batch_tokens=128,
    log_every=1, checkpoint_every_s=0.0,
)  # fmt: skip
LONGER = CONFIG.updated({"supernet_tokens": 1024})


def losses(run):
    with (run.supernet / "losses.csv").open() as file:
        return [(row["stage"], int(row["step"]), row["layer"], row["loss"]) for row in csv.DictReader(file)]


def weights(net):
    return {f"{g}.{n}": p.detach().clone() for g, m in net.trained().items() for n, p in m.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def interrupted(run, config, stage, call):
    calls = 0

    def interrupt(name, done, total):
        nonlocal calls
        calls += name == stage
        if name == stage and calls == call:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(run, config, dtype=torch.float32, progress=interrupt)


def test_a_finished_run_goes_on_where_it_ended(make_run):
    run = make_run()
    first = distill(run, CONFIG, dtype=torch.float32)
    before, old = losses(run), weights(first)
    seen = []
    more = weights(distill(run, LONGER, dtype=torch.float32, progress=lambda *row: seen.append(row)))
    assert seen == [("supernet", tokens, 1024) for tokens in (640, 768, 896, 1024)]
    assert losses(run)[: len(before)] == before
    assert not same(more, old)
    assert checkpoint.latest(run.supernet).state["cycles"] == {"align": [512], "supernet": [512, 1024]}
    again = distill(run, LONGER, dtype=torch.float32, progress=lambda *_: pytest.fail("trained"))
    assert same(weights(again), more)
    with pytest.raises(UserError, match=r"supernet_tokens 1024 \(asked: 512\).*more tokens"):
        distill(run, CONFIG, dtype=torch.float32)


@pytest.mark.parametrize(("config", "call"), [(CONFIG, 2), (LONGER, 6)])
def test_it_does_not_matter_when_more_was_asked_for_or_where_it_stopped(make_run, config, call):
    whole, stopped = make_run("whole"), make_run("stopped")
    distill(whole, CONFIG, dtype=torch.float32)
    expected = weights(distill(whole, LONGER, dtype=torch.float32))
    if config is LONGER:
        distill(stopped, CONFIG, dtype=torch.float32)
        call -= 4
    interrupted(stopped, config, "supernet", call)
    assert same(weights(distill(stopped, LONGER, dtype=torch.float32)), expected)
    assert losses(stopped) == losses(whole)


def test_a_stopped_stage_may_end_earlier_but_not_before_what_it_has_trained(make_run):
    run = make_run()
    interrupted(run, CONFIG, "supernet", 2)
    before = losses(run)
    with pytest.raises(UserError, match=r"supernet_tokens 512 \(asked: 256\)"):
        distill(run, CONFIG.updated({"supernet_tokens": 256}), dtype=torch.float32)
    seen = []
    shorter = CONFIG.updated({"supernet_tokens": 384})
    distill(run, shorter, dtype=torch.float32, progress=lambda *row: seen.append(row))
    assert seen == [("supernet", 384, 384)]
    assert losses(run)[: len(before)] == before
    assert checkpoint.latest(run.supernet).state["cycles"] == {"align": [512], "supernet": [384]}


def test_more_alignment_is_followed_by_the_whole_supernet_stage(make_run):
    run = make_run()
    distill(run, CONFIG, dtype=torch.float32)
    before = losses(run)
    seen = []
    distill(run, CONFIG.updated({"align_tokens": 768}), dtype=torch.float32, progress=lambda *row: seen.append(row[:2]))
    assert [row for row in seen if row[0] != "refit"] == [
        ("align", 640), ("align", 768), *(("supernet", tokens) for tokens in (128, 256, 384, 512)),
    ]  # fmt: skip
    after = losses(run)
    aligned = [row for row in before if row[0] == "align"]
    assert after[: len(aligned)] == aligned
    assert {row[1] for row in after if row[0] == "supernet"} == {1, 2, 3, 4}
    assert checkpoint.latest(run.supernet).state["cycles"] == {"align": [512, 768], "supernet": [512]}


def test_a_stage_that_had_nothing_can_get_tokens(make_run):
    run = make_run()
    distill(run, CONFIG.updated({"supernet_tokens": 0}), dtype=torch.float32)
    other = make_run("other")
    expected = weights(distill(other, CONFIG, dtype=torch.float32))
    assert same(weights(distill(run, CONFIG, dtype=torch.float32)), expected)


def test_every_cycle_warms_up_and_falls(make_run):
    run = make_run()
    distiller = Distiller(run, load_model(run.spec.model), CONFIG, threading.Event())
    distiller.prepare(0)
    loop = Loop(run.supernet, distiller.stage("align"), [20, 60], {}, threading.Event())
    factors = [loop.factor(step) for step in range(60)]
    assert factors[0] == 0.5
    assert factors[1] == factors[23] == 1.0
    assert factors[19] < 0.12
    assert factors[20] == 0.25
    assert factors[59] < 0.12


def test_finalising_goes_on_too(make_run):
    run, other = make_run(), make_run("other")
    for each in (run, other):
        distill(each, CONFIG, dtype=torch.float32)
    placement = ("J", "A", "W8", "J")
    finalize(run, placement, CONFIG, 512, dtype=torch.float32)
    steps = []
    folder = finalize(run, placement, CONFIG, 1024, dtype=torch.float32, progress=lambda *row: steps.append(row[1]))
    assert steps == [640, 768, 896, 1024]
    finalize(run, placement, CONFIG, 1024, dtype=torch.float32, progress=lambda *_: pytest.fail("trained"))
    expected = load_final(folder).decoder.state_dict()
    finalize(other, placement, CONFIG, 512, dtype=torch.float32)

    def interrupt(stage, done, total):
        if done == 768:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finalize(other, placement, CONFIG, 1024, dtype=torch.float32, progress=interrupt)
    got = load_final(finalize(other, placement, CONFIG, 1024, dtype=torch.float32)).decoder.state_dict()
    assert same(got, expected)
    assert (final_folder(other, placement) / MIXERS).is_file()


def test_finalising_takes_longer_rows(make_run):
    run = make_run()
    distill(run, CONFIG, dtype=torch.float32)
    placement = ("J", "A", "W8", "J")
    steps = []
    config = CONFIG.updated({"supernet_batch_tokens": 256})
    finalize(run, placement, config, 512, sequence=128, dtype=torch.float32, progress=lambda *row: steps.append(row[1]))
    assert steps == [256, 512]
    with pytest.raises(UserError, match="context"):
        finalize(run, placement, config, 2048, sequence=1024, dtype=torch.float32)
