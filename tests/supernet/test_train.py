"""Distillation: what it improves, what it must not touch, and that stopping changes nothing."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from tolerances import relative_rmse

from nasbench.checkpoints.load import load_model
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import MachineError, UserError
from nasbench.data.packing import Batch, Corpus
from nasbench.model import mixer_spec
from nasbench.model.block import features_of
from nasbench.spaces.space import count_full
from nasbench.supernet import checkpoint
from nasbench.supernet import steps as training_steps
from nasbench.supernet import train as training
from nasbench.supernet.layer_calls import GraphedLayerCalls
from nasbench.supernet.losses import energy, relative_error
from nasbench.supernet.ridge import solve_output_projections
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.steps import LossSums, align_step, distill_step, sample_placement
from nasbench.supernet.supernet import Supernet
from nasbench.supernet.train import distill

CONFIG = DistillConfig(
    ridge_tokens=512, align_tokens=768, supernet_tokens=768, align_batch_tokens=128, supernet_batch_tokens=128,
    log_every=2, checkpoint_every_s=0.0,
)  # fmt: skip


def losses(run):
    with (run.supernet / "losses.csv").open() as file:
        return [(row["stage"], row["step"], row["layer"], row["name"], row["loss"]) for row in csv.DictReader(file)]


def weights(net):
    return {f"{g}.{n}": p.detach().clone() for g, m in net.trained().items() for n, p in m.named_parameters()}


def test_select_shares_every_weight(make_run, tiny_model):
    net = Supernet(load_model(str(tiny_model)), make_run().spec.space)
    chosen = net.select(("J", "A", "W8", "A"))
    assert chosen.layers[0].self_attn is net.mixer(0, "J")
    assert chosen.layers[1].self_attn is net.teacher.layers[1].self_attn
    assert chosen.layers[2].mlp is net.teacher.layers[2].mlp
    assert chosen.model.embed_tokens is net.teacher.model.embed_tokens
    with pytest.raises(UserError, match="layer 0"):
        net.select(("G", "A", "A", "A"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_else_is_bit_identical_afterwards(make_run, tiny_model, dtype):
    before = load_model(str(tiny_model), dtype=dtype).decoder.state_dict()
    net = distill(make_run(names=("A", "W8", "J", "G")), CONFIG, dtype=dtype)
    after = net.teacher.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for layer in range(4):
        window, attention = net.mixer(layer, "W8").state_dict(), net.teacher.layers[layer].self_attn.state_dict()
        assert all(torch.equal(window[name], attention[name]) != (name == "o_proj.weight") for name in attention), layer


def test_ridge_is_the_least_squares_solution(make_run, tiny_model):
    run = make_run(names=("A", "J"))
    net = Supernet(load_model(str(tiny_model)), run.spec.space)
    tokens = Corpus.load(run.spec.data, net.tokenizer, 32).train[:32]
    layer, mixer = net.teacher.layers[0], net.mixer(0, "J")
    x, chunk = net.teacher.embed(tokens), net.teacher.sequence_meta(0, 32)
    inputs = layer.input_layernorm(x)
    target = layer.self_attn(inputs, chunk)
    seen = features_of(mixer, inputs, chunk).flatten(0, -2)
    before = float(relative_error(mixer(inputs, chunk), target, energy(target)).detach())
    solve_output_projections(
        net.teacher, [{"J": net.mixer(i, "J")} for i in range(4)], Batch(tokens).split(8), ridge=1e-9
    )
    solution = torch.linalg.lstsq(seen.double(), target.flatten(0, 1).double()).solution
    expected = (seen.double() @ solution).view_as(target)
    assert relative_rmse(mixer(inputs, chunk), expected) < 1e-3
    assert float(relative_error(mixer(inputs, chunk), target, energy(target)).detach()) < 0.8 * before


def test_training_improves_each_stage(make_run, tiny_model):
    run = make_run(names=("A", "J"))
    placement = ("J",) * 4

    def kl(net):
        tokens = Corpus.load(run.spec.data, net.tokenizer, 32).search[:32]
        with torch.no_grad():
            log_p, log_q = (torch.log_softmax(d(tokens).float(), -1) for d in (net.select(placement), net.teacher))
            return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())

    start = kl(Supernet(load_model(str(tiny_model)), run.spec.space))
    budget = {"align_lr": 3e-3, "supernet_lr": 3e-3, "align_tokens": 4096, "supernet_tokens": 4096}
    aligned = distill(
        run, CONFIG.updated({**budget, "supernet_tokens": 0, "checkpoint_every_s": 99.0}), dtype=torch.float32
    )
    both = distill(
        make_run("b", ("A", "J")), CONFIG.updated({**budget, "checkpoint_every_s": 99.0}), dtype=torch.float32
    )
    assert kl(aligned) < 0.8 * start
    assert kl(both) < kl(aligned)


@pytest.mark.parametrize("stage", ["ridge", "align", "refit", "supernet"])
def test_stopping_and_resuming_changes_nothing(make_run, stage, monkeypatch):
    monkeypatch.setattr(training, "SOLVE_BATCH_TOKENS", ByDevice(cpu=128))
    whole = make_run("whole")
    expected = weights(distill(whole, CONFIG, dtype=torch.bfloat16))
    stopped = make_run("stopped")
    calls = 0

    def interrupt(name, done, total):
        nonlocal calls
        calls += name == stage
        if name == stage and calls == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(stopped, CONFIG, dtype=torch.bfloat16, progress=interrupt)
    seen = []
    net = distill(stopped, CONFIG, dtype=torch.bfloat16, progress=lambda name, done, total: seen.append(name))
    assert losses(stopped) == losses(whole)
    for name, tensor in weights(net).items():
        assert torch.equal(tensor, expected[name]), name
    if stage == "supernet":
        assert "align" not in seen
    assert checkpoint.latest(stopped.supernet).state["stage"] == "done"


def test_kill_9_and_resume_changes_nothing(make_run):
    whole, killed = make_run("whole"), make_run("killed")
    expected = weights(distill(whole, CONFIG, dtype=torch.float32))
    script = f"""
import os, signal, torch
from pathlib import Path
from nasbench.runs import Run
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill
torch.set_num_threads(1)
count = 0
def die(stage, done, total):
    global count
    count += stage == "supernet"
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
distill(Run.open(Path({str(killed.path)!r})), {CONFIG!r}, dtype=torch.float32, progress=die)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    net = distill(killed, CONFIG, dtype=torch.float32)
    assert losses(killed) == losses(whole)
    for name, tensor in weights(net).items():
        assert relative_rmse(tensor, expected[name]) <= 1e-6, name


def test_finished_run_is_only_loaded_and_other_settings_are_refused(make_run):
    run = make_run()
    first = distill(run, CONFIG, dtype=torch.float32)
    again = distill(
        run, CONFIG.updated({"log_every": 3}), dtype=torch.float32, progress=lambda *_: pytest.fail("trained")
    )
    assert first.version == again.version == Supernet.load(run).version
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, weights(first)[name]), name
    with pytest.raises(UserError, match=r"align_lr 0.002 \(asked: 0.5\)"):
        distill(run, CONFIG.updated({"align_lr": 0.5}), dtype=torch.float32)
    with pytest.raises(UserError, match="dtype 'float32'"):
        distill(run, CONFIG, dtype=torch.bfloat16)


def test_damaged_checkpoints_are_one_line(make_run):
    run = make_run()
    with pytest.raises(UserError, match="no supernet yet"):
        Supernet.load(run)
    distill(run, CONFIG, dtype=torch.float32)
    path = next(run.supernet.glob("done-*")) / checkpoint.WEIGHTS
    whole = path.read_bytes()
    for damage in (whole[:-100], whole[:-1] + b"?", b""):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="corrupt") as caught:
            Supernet.load(run)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="corrupt"):
        Supernet.load(run)
    (run.supernet / checkpoint.LATEST).write_text("{}")
    with pytest.raises(UserError, match="no complete checkpoint"):
        Supernet.load(run)


def poison(monkeypatch, spoil, at=4):
    """From now on alignment's step number `at` is spoiled by spoil(net, sums)."""
    steps = 0

    def poisoned(net, batch, sums, workers):
        nonlocal steps
        align_step(net, batch, sums, workers)
        steps += 1
        if steps == at:
            spoil(net, sums)

    monkeypatch.setattr(training_steps, "align_step", poisoned)


def nan_loss(net, sums):
    sums.add("layers.2.J", torch.tensor(math.nan))


def nan_gradient(net, sums):
    net.mixer(2, "J").q_proj.weight.grad[0, 0] = math.nan


@pytest.mark.parametrize("spoil", [nan_loss, nan_gradient])
def test_a_mixer_that_is_not_finite_is_left_out_counted_and_reported(make_run, monkeypatch, spoil):
    config = CONFIG.updated({"supernet_tokens": 0})
    calm, run, notices = make_run("calm"), make_run(), []
    expected = weights(distill(calm, config, dtype=torch.float32))
    poison(monkeypatch, spoil)
    got = weights(distill(run, config, dtype=torch.float32, notice=notices.append))
    assert all(bool(tensor.isfinite().all()) for tensor in got.values())
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]) or name.startswith("layers.2.J."), name
    assert not torch.equal(got["layers.2.J.q_proj.weight"], expected["layers.2.J.q_proj.weight"])
    assert "layers.2.J" in notices[0]
    assert notices[1] == "layers.2.J: 1 of 6 steps of align left out, not finite"
    with (run.supernet / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped"] for row in rows] == ["", "layers.2.J:1", ""]
    assert [int(row["tokens"]) for row in rows] == [256, 512, 768]
    assert all(float(row["tok_s"]) > 0 and float(row["seconds"]) > 0 for row in rows)
    assert all(math.isfinite(float(row[-1])) for row in losses(run))


def test_alignment_that_loses_every_mixer_stops_with_a_name_and_keeps_the_checkpoint(make_run):
    run = make_run()
    with pytest.raises(MachineError, match=r"layers\.0\.J is not finite at step \d of stage align: lower align_lr"):
        distill(run, CONFIG.updated({"align_lr": 1e30}), dtype=torch.float32)
    saved = checkpoint.latest(run.supernet)
    assert saved.state["stage"] == "align"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.weights().values())


def test_a_network_that_is_not_finite_stops_with_step_and_layer_and_keeps_the_checkpoint(make_run, monkeypatch):
    run = make_run(names=("A", "J"))
    plain, steps = training_steps.distill_step, 0

    def spoiled(net, *args):
        nonlocal steps
        steps += 1
        if steps == 4:
            net.mixer(2, "J").o_proj.weight.data[0, 0] = math.inf
        plain(net, *args)

    monkeypatch.setattr(training_steps, "distill_step", spoiled)
    with pytest.raises(MachineError, match=r"layers\.2\.J is not finite at step [34] of stage supernet"):
        distill(run, CONFIG.updated({"smallest_every": 1}), dtype=torch.float32)
    saved = checkpoint.latest(run.supernet)
    assert (saved.state["stage"], saved.state["step"]) == ("supernet", 3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.weights().values())


def test_a_diverging_layer_does_not_poison_the_others(make_run, tiny_model):
    def gradients(scale):
        net = Supernet(load_model(str(tiny_model)), make_run().spec.space)
        net.mixer(1, "J").o_proj.weight.data.mul_(scale)
        tokens = Corpus.load(make_run().spec.data, net.tokenizer, 32).train[:4]
        align_step(net, Batch(tokens), LossSums(["", *net.trained()]))
        return {layer: net.mixer(layer, "J").q_proj.weight.grad for layer in (0, 2, 3)}

    calm, wild = gradients(1.0), gradients(1e30)
    assert all(torch.equal(calm[layer], wild[layer]) for layer in calm)


def test_sampled_placements_are_legal_reproducible_and_varied(make_run):
    space, config = make_run(names=("A", "W8", "J", "G")).spec.space, DistillConfig(least_full=0.25, most_full=0.75)
    placements = [sample_placement(space, config, 0, step) for step in range(200)]
    assert placements == [sample_placement(space, config, 0, step) for step in range(200)]
    counts = [count_full(space.check(placement)) for placement in placements]
    assert set(counts) == {1, 2, 3}
    assert set(counts[::4]) == {1}
    assert {placement[0] for placement in placements} == {"A", "W8", "J", "G"}


def test_model_with_other_layers_is_no_teacher(tiny_model, make_run):
    loaded = load_model(str(tiny_model))
    space = make_run().spec.space
    loaded.decoder.placement = ("A", "W8", "A", "A")
    with pytest.raises(UserError, match="A W8 2A, the run's model was 4A"):
        Supernet(loaded, space)
    linear = mixer_spec("J", loaded.shape.layer()).build()
    with pytest.raises(UserError, match=r"cannot be a teacher.*no attention"):
        Supernet(replace(loaded, decoder=loaded.decoder.with_mixers([linear] * 4, ("J",) * 4)), space)


def test_settings_from_toml(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('align_tokens = 1024\nfrozen = ["W", "G"]\n')
    assert DistillConfig.read(path) == DistillConfig(align_tokens=1024, frozen=("W", "G"))
    for text, message in [
        ("align_token = 1", "did you mean 'align_tokens'"),
        ("align_tokens = 1.5", "bad align_tokens 1.5"),
        ("align_tokens = -1", "bad align_tokens -1"),
        ("align_lr = 'x'", "bad align_lr 'x'"),
        ("most_full = 2", "most_full"),
        ("repeat_share = 1.5", "bad repeat_share 1.5"),
        ("align_tokens", "not valid TOML"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            DistillConfig.read(path)
    with pytest.raises(UserError, match="no such file"):
        DistillConfig.read(tmp_path / "absent.toml")


def test_rows_that_repeat_are_read_as_one_text(make_run):
    with pytest.raises(UserError, match=r"repeat_share 0.5 .*set documents = false"):
        distill(make_run(), CONFIG.updated({"repeat_share": 0.5}), dtype=torch.float32)
    told = []
    for share in (0.0, 0.5):
        run = make_run(f"share-{share}")
        distill(run, CONFIG.updated({"repeat_share": share, "documents": False}), dtype=torch.float32)
        told.append(losses(run))
    assert len(told[0]) == len(told[1])
    assert told[0] != told[1]


def test_checkpoint_state_is_readable(make_run):
    run = make_run()
    distill(run, CONFIG, dtype=torch.float32)
    state = json.loads((checkpoint.latest(run.supernet).folder / checkpoint.STATE).read_text())
    assert state["settings"]["align_tokens"] == CONFIG.align_tokens
    assert not list(run.supernet.rglob("*.pt")) + list(run.supernet.rglob("*.pkl"))


def test_sandwich_trains_the_smallest_beside_the_sampled_network(make_run, tiny_model):
    run = make_run(names=("A", "J"))
    config = CONFIG.updated({"sandwich": True, "smallest_every": 0})
    distiller = training.Distiller(run, load_model(str(tiny_model)), config, threading.Event())
    drawn = [distiller.placements(step) for step in range(40)]
    assert all(placements[0] == ("J",) * 4 for placements in drawn)
    assert {len(placements) for placements in drawn} == {1, 2}
    assert distill(run, config, dtype=torch.float32).version


def test_a_falling_schedule_ends_at_the_smallest(make_run):
    space, config = make_run(names=("A", "J")).spec.space, DistillConfig(full_schedule="falling", most_full=1.0)
    counts = [
        [sum(name == "A" for name in sample_placement(space, config, 0, step, done)) for step in range(100)]
        for done in (0.0, 0.5, 1.0)
    ]
    assert [max(drawn) for drawn in counts] == [4, 2, 0]


def test_recomputed_activations_give_the_same_gradients(make_run, tiny_model):
    def gradients(recompute):
        net = Supernet(load_model(str(tiny_model)), make_run().spec.space)
        batch = Corpus.load(make_run().spec.data, net.tokenizer, 32).batch(0, 4, 0)
        config = CONFIG.updated({"recompute": recompute, "hidden_weight": 0.5})
        distill_step(net, [("J", "A", "W8", "J")], batch, LossSums(["", *net.trained()]), config)
        return {name: p.grad for name, p in net.mixer(0, "J").named_parameters()}

    kept, again = gradients(False), gradients(True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_without_transfer_trained_mixers_start_random_and_frozen_ones_do_not(make_run, tiny_model):
    space = make_run().spec.space
    nets = [Supernet(load_model(str(tiny_model)), space, transfer=transfer) for transfer in (True, False)]
    attention = nets[0].teacher.layers[1].self_attn
    for net in nets:
        assert torch.equal(net.mixer(1, "W8").q_proj.weight, attention.q_proj.weight)
    assert not torch.equal(nets[0].mixer(1, "J").q_proj.weight, nets[1].mixer(1, "J").q_proj.weight)
    assert distill(make_run(), CONFIG.updated({"transfer": False}), dtype=torch.float32).version


def test_the_readout_of_a_frozen_kind_can_be_solved(make_run, tiny_model):
    run = make_run(names=("A", "W4", "J"))
    net = distill(run, CONFIG.updated({"ridge": 1e-3}), dtype=torch.float32)
    loaded = Supernet.load(run)
    tokens = Corpus.load(run.spec.data, net.tokenizer, 32).search[:64]
    for layer in range(4):
        window, attention = loaded.mixer(layer, "W4"), loaded.teacher.layers[layer].self_attn
        assert torch.equal(window.o_proj.weight, net.mixer(layer, "W4").o_proj.weight)
        assert not torch.equal(window.o_proj.weight, attention.o_proj.weight)
        assert torch.equal(window.q_proj.weight, attention.q_proj.weight)
    plain = Supernet(load_model(str(tiny_model)), run.spec.space)
    x, chunk = plain.teacher.embed(tokens), plain.teacher.sequence_meta(0, 32)
    inputs = plain.teacher.layers[0].input_layernorm(x)
    target = plain.teacher.layers[0].self_attn(inputs, chunk)
    errors = [
        float(relative_error(n.mixer(0, "W4")(inputs, chunk), target, energy(target)).detach()) for n in (plain, loaded)
    ]
    assert errors[1] < errors[0]


def test_graphed_layers_are_the_layers(make_run, tiny_model, monkeypatch):
    """What a GPU replays, called in its place: same losses and gradients, every layer and kind captured once."""
    captured = []

    def stand_in(modules, arguments, allow_unused_input):
        captured.append((len(modules), {id(tensor) for group in arguments for tensor in group}))
        return modules

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)

    def gradients(graphed):
        net = Supernet(load_model(str(tiny_model)), make_run().spec.space)
        batch = Corpus.load(make_run().spec.data, net.tokenizer, 32).batch(0, 4, 0)
        calls = (
            GraphedLayerCalls(net, [("A", *net.space.alternatives(i)) for i in range(4)], batch) if graphed else None
        )
        sums = LossSums(["", *net.trained()])
        placements = [("J", "A", "W8", "J"), ("A", "A", "J", "W8")]
        distill_step(net, placements, batch, sums, CONFIG, calls=calls)
        return [sums.now, *(p.grad for layer in (0, 2, 3) for p in net.mixer(layer, "J").parameters())]

    assert all(torch.equal(one, other) for one, other in zip(gradients(True), gradients(False), strict=True))
    assert captured[0][0] == 12
    assert len(captured[0][1]) == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_sees_the_whole_row_stays_the_attention(make_run, dtype):
    net = distill(make_run(names=("A", "W64", "W4", "J")), CONFIG, dtype=dtype)
    for layer in range(4):
        attention = net.teacher.layers[layer].self_attn.o_proj.weight
        assert torch.equal(net.mixer(layer, "W64").o_proj.weight, attention)
        assert not torch.equal(net.mixer(layer, "W4").o_proj.weight, attention)


def test_frozen_without_solving_is_the_attention(make_run):
    net = distill(make_run(names=("A", "W4", "J")), CONFIG.updated({"solved": []}), dtype=torch.float32)
    assert torch.equal(net.mixer(1, "W4").o_proj.weight, net.teacher.layers[1].self_attn.o_proj.weight)
