"""Distillation: what it improves, what it must not touch, and that stopping changes nothing."""

import csv
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from tolerances import relative_rmse

from nasbench.backbone.load import load_model
from nasbench.errors import MachineError, UserError
from nasbench.spaces.placement import kind_of
from nasbench.supernet import checkpoint
from nasbench.supernet import train as training
from nasbench.supernet.data import Batch, Corpus
from nasbench.supernet.loop import LossSums
from nasbench.supernet.losses import relative_error
from nasbench.supernet.ridge import features, solve_readouts
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.supernet import Supernet
from nasbench.supernet.train import align_step, distill, sample_placement

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
    net = Supernet.build(load_model(str(tiny_model)), make_run().spec.space)
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
        assert all(torch.equal(window[name], attention[name]) for name in attention), layer


def test_ridge_is_the_least_squares_solution(make_run, tiny_model):
    run = make_run(names=("A", "J"))
    net = Supernet.build(load_model(str(tiny_model)), run.spec.space)
    tokens = Corpus.load(run.spec.data, net.tokenizer, 32).train[:32]
    layer, mixer = net.teacher.layers[0], net.mixer(0, "J")
    x, chunk = net.teacher.embed(tokens), net.teacher.chunk(0, 32)
    inputs = layer.attention_input(x)
    target = layer.self_attn(inputs, chunk)
    seen = features(mixer, inputs, chunk)
    before = float(relative_error(mixer(inputs, chunk), target).detach())
    solve_readouts(net.teacher, [{"J": net.mixer(i, "J")} for i in range(4)], Batch(tokens).split(8), ridge=1e-9)
    solution = torch.linalg.lstsq(seen.double(), target.flatten(0, 1).double()).solution
    expected = (seen.double() @ solution).view_as(target)
    assert relative_rmse(mixer(inputs, chunk), expected) < 1e-3
    assert float(relative_error(mixer(inputs, chunk), target).detach()) < 0.8 * before


def test_training_improves_each_stage(make_run, tiny_model):
    run = make_run(names=("A", "J"))
    placement = ("J",) * 4

    def kl(net):
        tokens = Corpus.load(run.spec.data, net.tokenizer, 32).search[:32]
        with torch.no_grad():
            log_p, log_q = (torch.log_softmax(d(tokens).float(), -1) for d in (net.select(placement), net.teacher))
            return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())

    start = kl(Supernet.build(load_model(str(tiny_model)), run.spec.space))
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
    monkeypatch.setattr(training, "SOLVE_BATCH_TOKENS", 128)
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


def test_a_loss_that_is_not_finite_names_step_and_layer_and_keeps_the_checkpoint(make_run, monkeypatch):
    run = make_run()

    def poisoned(net, tokens, sums):
        align_step(net, tokens, sums)
        poisoned.steps += 1
        if poisoned.steps == 4:
            sums.add("layers.2.J", torch.tensor(math.nan))

    poisoned.steps = 0
    monkeypatch.setattr(training, "align_step", poisoned)
    with pytest.raises(MachineError, match=r"layers\.2\.J is not finite at step 4 of stage align"):
        distill(run, CONFIG, dtype=torch.float32)
    saved = checkpoint.latest(run.supernet)
    assert (saved.state["stage"], saved.state["step"]) == ("align", 3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.weights().values())


def test_a_weight_that_is_not_finite_is_not_saved(make_run, monkeypatch):
    run = make_run()

    def poisoned(net, tokens, sums):
        align_step(net, tokens, sums)
        poisoned.steps += 1
        if poisoned.steps == 3:
            net.mixer(1, "J").q_proj.weight.grad.fill_(math.nan)

    poisoned.steps = 0
    monkeypatch.setattr(training, "align_step", poisoned)
    with pytest.raises(MachineError, match=r"layers\.1\.J"):
        distill(run, CONFIG, dtype=torch.float32)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.latest(run.supernet).weights().values())


def test_a_diverging_layer_does_not_poison_the_others(make_run, tiny_model):
    def gradients(scale):
        net = Supernet.build(load_model(str(tiny_model)), make_run().spec.space)
        net.mixer(1, "J").o_proj.weight.data.mul_(scale)
        tokens = Corpus.load(make_run().spec.data, net.tokenizer, 32).train[:4]
        align_step(net, Batch(tokens), LossSums(["", *net.trained()], torch.zeros(2, 5)))
        return {layer: net.mixer(layer, "J").q_proj.weight.grad for layer in (0, 2, 3)}

    calm, wild = gradients(1.0), gradients(1e30)
    assert all(torch.equal(calm[layer], wild[layer]) for layer in calm)


def test_sampled_placements_are_legal_reproducible_and_varied(make_run):
    space, config = make_run(names=("A", "W8", "J", "G")).spec.space, DistillConfig(least_full=0.25, most_full=0.75)
    placements = [sample_placement(space, config, 0, step) for step in range(200)]
    assert placements == [sample_placement(space, config, 0, step) for step in range(200)]
    counts = [sum(kind_of(name) == "A" for name in space.check(placement)) for placement in placements]
    assert set(counts) == {1, 2, 3}
    assert set(counts[::4]) == {1}
    assert {placement[0] for placement in placements} == {"A", "W8", "J", "G"}


def test_model_with_other_layers_is_no_teacher(tiny_model, make_run):
    loaded = load_model(str(tiny_model))
    space = make_run().spec.space
    loaded.decoder.placement = ("A", "W8", "A", "A")
    with pytest.raises(UserError, match="no full-attention model"):
        Supernet.build(loaded, space)


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
        ("align_tokens", "not valid TOML"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            DistillConfig.read(path)
    with pytest.raises(UserError, match="no such file"):
        DistillConfig.read(tmp_path / "absent.toml")


def test_checkpoint_state_is_readable(make_run):
    run = make_run()
    distill(run, CONFIG, dtype=torch.float32)
    state = json.loads((checkpoint.latest(run.supernet).folder / checkpoint.STATE).read_text())
    assert state["settings"]["align_tokens"] == CONFIG.align_tokens
    assert not list(run.supernet.rglob("*.pt")) + list(run.supernet.rglob("*.pkl"))
