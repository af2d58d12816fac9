"""Two processes over gloo that each hold half of all weights train what one process does that holds them whole."""

import shutil
import threading
from ast import literal_eval

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from supernet_workers import TRAINING, assert_same, said, start, together
from tolerances import relative_rmse

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import UserError
from nasbench.spaces.placement import parse_placement
from nasbench.supernet import checkpoint
from nasbench.supernet.budget import estimate
from nasbench.supernet.finalize import MIXERS, finalize
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import Distiller, distill

WHOLE = DistillConfig(
    ridge_tokens=512, align_tokens=768, supernet_tokens=768, align_batch_tokens=128, supernet_batch_tokens=128,
    hidden_weight=0.5, log_every=2, checkpoint_every_s=0.0,
)  # fmt: skip
SHARDED = WHOLE.updated({"shard": True})
SHARES = """
import threading
from torch.distributed.tensor import DTensor
from nasbench.checkpoints.load import load_model
from nasbench.supernet import steps, train
from nasbench.supernet.budget import estimate
from nasbench.parallel.fsdp import local
with dist_context("cpu") as (workers, device):
    loaded = load_model(run.spec.model, dtype=torch.bfloat16)
    distiller = train.Distiller(run, loaded, {config!r}, threading.Event(), workers=workers)
    distiller.prepare(512)
    stage = distiller.stage("align")
    optimizer, plain = stage.optimizer, steps.align_step
    def align_step(net, *rest):
        plain(net, *rest)
        if workers.rank == 1:
            local(net.mixer(2, "J").q_proj.weight.grad)[0, 0] = torch.nan
    steps.align_step = align_step
    before = local(distiller.net.mixer(2, "J").q_proj.weight).clone()
    stage.gradients(0)
    optimizer.apply(1.0)
    tensors = [*distiller.net.teacher.parameters(), *(p for m in distiller.net.mixers() for p in m.parameters())]
    moments = [t for t in optimizer.state().values() if t.ndim]
    for kind in (tensors, moments):
        shared = [t for t in kind if isinstance(t, DTensor)]
        print(sum(local(t).numel() for t in shared), sum(t.numel() for t in shared), sum(t.numel() for t in kind))
    print(sorted({{str(p.dtype) for m in distiller.net.trained().values() for p in m.parameters()}}))
    print(dict(zip(optimizer.groups, optimizer.skipped.tolist())))
    print(all(bool(local(t).isfinite().all()) for t in (*tensors, *moments)))
    print(torch.equal(before, local(distiller.net.mixer(2, "J").q_proj.weight)))
    steps.align_step = plain
    found = estimate(distiller)
    print(found.model_bytes, found.training_bytes, found.processes)
"""
FINALISING = """
from nasbench.spaces.placement import parse_placement
from nasbench.supernet.budget import estimate
from nasbench.supernet.finalize import finalize
with dist_context("cpu") as (workers, device):
    finalize(run, parse_placement("J A W8 J"), {config!r}, {tokens}, dtype=torch.float32, workers=workers)
"""


def stopped_at(run, config, step, **options):
    """Trains until a Ctrl-C in step `step` of the supernet stage, and says where its checkpoint is."""
    together(run, config, stop_at=step, **options)
    state = checkpoint.latest(run.supernet).state
    return state["stage"], state["step"]


def test_two_processes_with_half_of_the_weights_are_one(make_run):
    alone, two = make_run("alone"), make_run("two")
    # Two kinds of a layer learn, and in a step two sub-networks add to the same gradients.
    both = {"frozen": (), "solved": (), "sandwich": True}
    distill(alone, WHOLE.updated(both), dtype=torch.float32)
    together(two, SHARDED.updated(both))
    assert_same(two, alone)
    assert not (checkpoint.latest(two.supernet).folder / checkpoint.MOMENTS).exists()


def test_two_begin_and_one_ends_and_the_other_way_round(make_run):
    alone, there, back = (make_run(name) for name in ("alone", "there", "back"))
    distill(alone, WHOLE, dtype=torch.float32)
    assert stopped_at(there, SHARDED, 3) == ("supernet", 4)
    saved = checkpoint.latest(there.supernet)
    parts = sorted((saved.folder / checkpoint.MOMENTS).iterdir())
    assert sorted(saved.state["moments"]) == [part.name for part in parts]
    sizes = []
    for part in parts:
        with safe_open(part, "pt") as file:
            sizes.append({key: file.get_slice(key).get_shape()[0] for key in file.keys()})  # noqa: SIM118
    whole = saved.weights()
    assert len(sizes) == 2
    for key in sizes[0]:
        assert sizes[0][key] + sizes[1][key] == whole[key.split(":")[1]].shape[0]
    distill(there, WHOLE, dtype=torch.float32)
    assert_same(there, alone)
    assert stopped_at(back, WHOLE, 3, size=1) == ("supernet", 3)
    together(back, SHARDED)
    assert_same(back, alone)


def test_a_kill_leaves_a_checkpoint_that_another_number_goes_on_from(make_run):
    alone, killed = make_run("alone"), make_run("killed")
    batches = {"align_batch_tokens": 192, "supernet_batch_tokens": 192}
    distill(alone, WHOLE.updated(batches), dtype=torch.float32)
    workers = start(TRAINING.format(config=SHARDED.updated(batches), signal="signal.SIGKILL"), killed.path, 3)
    workers[0].wait(120)
    workers[1].kill()  # as torchrun does
    workers[1].communicate()
    workers[0].communicate()
    state = checkpoint.latest(killed.supernet).state
    assert (state["stage"], state["step"]) == ("supernet", 2)
    together(killed, SHARDED.updated(batches), size=3)  # shares of different lengths
    assert_same(killed, alone)


def test_a_damaged_share_is_found(make_run):
    run = make_run()
    stopped_at(run, SHARDED, 3)
    part = next((checkpoint.latest(run.supernet).folder / checkpoint.MOMENTS).iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="corrupt"):
        distill(run, WHOLE, dtype=torch.float32)


def test_every_process_holds_half_and_leaves_out_what_is_not_finite_in_one(make_run):
    run = make_run()
    loaded = load_model(run.spec.model, dtype=torch.bfloat16)
    alone = estimate(Distiller(run, loaded, WHOLE, threading.Event()))
    for out in said(start(SHARES.format(config=SHARDED), run.path)):
        weights, moments, dtypes, skipped, finite, kept, bytes_ = out.splitlines()
        for row in (weights, moments):
            own, shared, everything = map(int, row.split())
            assert own == pytest.approx(shared / 2, rel=0.02)
            assert shared > 0.97 * everything
        assert dtypes == "['torch.float32']"
        assert literal_eval(skipped) == {f"layers.{i}.J": float(i == 2) for i in range(4)}
        assert (finite, kept) == ("True", "True")
        model, training, processes = map(int, bytes_.split())
        assert processes == 2
        assert model == pytest.approx(alone.model_bytes / 2, rel=0.03)
        # No rounded copy beside the master: 16 bytes a number instead of 18, but the decays' whole.
        assert training == pytest.approx(alone.training_bytes / 2 * 16 / 18, rel=0.03)


def test_one_process_has_nobody_to_share_with(make_run):
    with pytest.raises(UserError, match="torchrun"):
        distill(make_run(), SHARDED)
    with pytest.raises(UserError, match="graphs"):
        SHARDED.updated({"graphs": True})


def test_whole_layers_are_finalised_with_half_of_the_weights(make_run):
    """Of every layer MLP and attention are shared out, norms are not; activations are computed again."""
    run = make_run()
    distill(run, WHOLE.updated({"align_tokens": 0, "supernet_tokens": 0}), dtype=torch.float32)
    config = WHOLE.updated({"whole": True, "recompute": True})
    placement = parse_placement("J A W8 J")
    for tokens in (256, 512):
        folder = finalize(run, placement, config, tokens, dtype=torch.float32)
    expected = load_file(folder / MIXERS)
    shutil.rmtree(folder)
    # The second goes on from what the first has finished.
    for tokens in (256, 512):
        said(start(FINALISING.format(config=config.updated({"shard": True}), tokens=tokens), run.path))
    found = load_file(folder / MIXERS)
    assert found.keys() == expected.keys()
    assert any(".rest." in name for name in found)
    for name, tensor in found.items():
        assert relative_rmse(tensor, expected[name]) < 1e-3, name
