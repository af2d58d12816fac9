"""Finalising: improves the placement, leaves the supernet, resumes, reads back."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from nasbench.core.errors import UserError
from nasbench.data.packing import Corpus
from nasbench.evaluation.averaging import SHARES, losses_by_share
from nasbench.evaluation.evaluator import Evaluator
from nasbench.evaluation.tasks import HeldOutLoss
from nasbench.supernet import checkpoint
from nasbench.supernet.finalize import MIXERS, average_final, final_folder, finalize, is_final, load_final, use_final
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.supernet import Supernet
from nasbench.supernet.train import distill

CONFIG = DistillConfig(
    ridge_tokens=512, align_tokens=0, supernet_tokens=0, supernet_batch_tokens=128, supernet_lr=3e-3,
    checkpoint_every_s=0.0,
)  # fmt: skip
PLACEMENT = ("J", "A", "W8", "J")


@pytest.fixture
def run(make_run):
    run = make_run()
    distill(run, CONFIG, dtype=torch.float32)
    return run


def divergence(decoder, teacher, tokens):
    with torch.no_grad():
        log_p, log_q = torch.log_softmax(decoder(tokens), -1), torch.log_softmax(teacher(tokens), -1)
        return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())


def test_final_is_better_and_the_supernet_stays(run):
    net = Supernet.load(run)
    tokens = Corpus.load(run.spec.data, net.tokenizer, 32).search[:32]
    before = divergence(net.select(PLACEMENT), net.teacher, tokens)
    folder = finalize(run, PLACEMENT, CONFIG, 4096, dtype=torch.float32)
    assert folder == run.final / "J-A-W8-J"
    assert is_final(folder)
    loaded = load_final(folder)
    assert loaded.decoder.placement == PLACEMENT
    assert divergence(loaded.decoder, net.teacher, tokens) < 0.9 * before
    assert Supernet.load(run).version == net.version
    window = loaded.decoder.layers[2].self_attn
    assert not torch.equal(window.q_proj.weight, net.mixer(2, "W8").q_proj.weight)
    assert torch.equal(loaded.decoder.layers[1].self_attn.q_proj.weight, net.teacher.layers[1].self_attn.q_proj.weight)


def test_a_whole_hybrid_has_layers_of_its_own(run):
    net = Supernet.load(run)
    tokens = Corpus.load(run.spec.data, net.tokenizer, 32).search[:32]
    whole = CONFIG.updated({"whole": True})
    placement = ("A", "J", "A", "W8")
    before = {name: tensor.clone() for name, tensor in net.teacher.state_dict().items()}
    mixers_alone = load_final(finalize(run, placement, CONFIG, 4096, dtype=torch.float32)).decoder
    folder = finalize(run, placement, whole, 4096, dtype=torch.float32, name="whole")
    loaded = load_final(folder)
    far = divergence(mixers_alone, net.teacher, tokens)
    assert divergence(loaded.decoder, net.teacher, tokens) < far
    state = loaded.decoder.state_dict()
    changed = {name for name, tensor in before.items() if name in state and not torch.equal(state[name], tensor)}
    assert {name.split(".")[2] for name in changed} == {"1", "2", "3"}, "nothing before the first replaced layer"
    assert {"model.layers.2.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"} <= changed

    assert use_final(net, folder) == placement
    ours = net.select(placement).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(net.teacher.state_dict()[name], tensor) for name, tensor in before.items())
    more = load_final(finalize(run, placement, whole, 8192, dtype=torch.float32, name="whole"))
    assert divergence(more.decoder, net.teacher, tokens) < divergence(loaded.decoder, net.teacher, tokens)


@pytest.mark.parametrize("whole", [False, True])
def test_an_average_lies_between_before_and_after(run, whole):
    net = Supernet.load(run)
    config = CONFIG.updated({"whole": whole})
    after = load_final(finalize(run, PLACEMENT, config, 1024, dtype=torch.float32)).decoder.state_dict()
    before = net.select(PLACEMENT).state_dict()
    folder = average_final(run, PLACEMENT, "average", share=0.25, dtype=torch.float32)
    found = load_final(folder).decoder.state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, torch.lerp(before[name], after[name], 0.25), msg=name)
    assert not torch.equal(
        found["model.layers.3.self_attn.q_proj.weight"], before["model.layers.3.self_attn.q_proj.weight"]
    )
    source = final_folder(run, PLACEMENT) / MIXERS
    weights = load_file(source)
    save_file({name: tensor for name, tensor in weights.items() if not name.endswith("q_proj.weight")}, source)
    with pytest.raises(UserError, match=r"lacks layers.*q_proj"):
        average_final(run, PLACEMENT, "average", dtype=torch.float32)
    distill(run, CONFIG.updated({"supernet_tokens": 256}), dtype=torch.float32)
    with pytest.raises(UserError, match="not finalised from"):
        average_final(run, PLACEMENT, "average", dtype=torch.float32)


def test_the_losses_by_share_run_from_before_to_after(run):
    folder = finalize(run, PLACEMENT, CONFIG, 4096, dtype=torch.float32)
    losses = losses_by_share(run, PLACEMENT, dtype=torch.float32)
    assert list(losses) == list(SHARES)
    assert len(set(losses.values())) == len(SHARES)
    evaluator = Evaluator.open(run, dtype=torch.float32)
    for share in (0.0, 1.0):
        if share:
            use_final(evaluator.supernet, folder)
        found = HeldOutLoss().score(evaluator.supernet.select(PLACEMENT), evaluator.context("search"))
        assert found.value == pytest.approx(losses[share], abs=1e-5)


def test_no_tokens_takes_the_supernet_as_it_is(run):
    net = Supernet.load(run)
    loaded = load_final(finalize(run, PLACEMENT, CONFIG, 0, dtype=torch.float32))
    tokens = torch.randint(256, (2, 20))
    assert torch.equal(loaded.decoder(tokens), net.select(PLACEMENT)(tokens))


def test_stopping_changes_nothing(run):
    whole = load_final(finalize(run, PLACEMENT, CONFIG, 1024, dtype=torch.bfloat16)).decoder.state_dict()
    folder = final_folder(run, PLACEMENT)
    (folder / MIXERS).unlink()

    def interrupt(stage, done, total):
        if done == 512:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finalize(run, PLACEMENT, CONFIG, 1024, dtype=torch.bfloat16, progress=interrupt)
    steps = []
    finalize(run, PLACEMENT, CONFIG, 1024, dtype=torch.bfloat16, progress=lambda _, done, total: steps.append(done))
    assert steps == [640, 768, 896, 1024]
    for name, tensor in load_final(folder).decoder.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    assert checkpoint.latest(folder / "training") is None


def test_bad_placements_and_damage(run):
    with pytest.raises(UserError, match="layer 0"):
        finalize(run, ("G", "A", "A", "A"), CONFIG, 0)
    folder = finalize(run, PLACEMENT, CONFIG, 0)
    path = folder / MIXERS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="corrupt"):
        load_final(folder)
    (folder / "final.json").write_text("{}")
    with pytest.raises(UserError, match="lacks 'model'"):
        load_final(folder)
