"""On a CUDA GPU: alignment replayed from a graph trains what alignment launched kernel by kernel does."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tolerances import relative_rmse

from nasbench.runs import Run, RunSpec
from nasbench.supernet import steps
from nasbench.supernet.finalize import finalize
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill

pytestmark = pytest.mark.gpu


class Eager:
    def __init__(self, stage, batch):
        self.stage = stage

    def __call__(self, batch):
        stage = self.stage
        steps.align_step(stage.net, batch, stage.sums)
        steps.reduce_and_clip(stage.optimizer, stage.sums, stage.workers)


def test_a_replayed_step_is_the_eager_step(tiny_model, text_file, tmp_path, monkeypatch):
    config = DistillConfig(
        ridge_tokens=256, align_tokens=4096, supernet_tokens=0, align_batch_tokens=256, log_every=4
    )  # fmt: skip
    weights, losses = [], []
    for name in ("graph", "eager"):
        run = Run.create(tmp_path / name, RunSpec(str(tiny_model), ("A", "J", "G"), 4, str(text_file), 64, 0))
        if name == "eager":
            monkeypatch.setattr(steps, "GraphedStep", Eager)
        net = distill(run, config, device="cuda", dtype=torch.float32)
        weights.append({group: mixer.state_dict() for group, mixer in net.trained().items()})
        losses.append((run.supernet / "losses.csv").read_text())
    assert weights[0].keys() == weights[1].keys()
    for group, state in weights[0].items():
        for key, value in state.items():
            assert relative_rmse(value, weights[1][group][key]) < 1e-2, (group, key)
    for ours, theirs in zip(*(text.splitlines()[1:] for text in losses), strict=True):
        assert float(ours.split(",")[-1]) == pytest.approx(float(theirs.split(",")[-1]), rel=1e-3)


def test_a_hybrid_finalised_whole_from_graphs_is_the_eager_one(tiny_model, text_file, tmp_path):
    start = DistillConfig(ridge_tokens=256, align_tokens=0, supernet_tokens=0)
    config = replace(start, supernet_batch_tokens=256, supernet_lr=1e-3, hidden_weight=0.1, whole=True, log_every=1)
    placement = ("W8", "A", "J", "G")
    weights, losses = [], []
    for graphs in (False, True):
        run = Run.create(tmp_path / str(graphs), RunSpec(str(tiny_model), ("A", "W8", "J", "G"), 4, str(text_file), 64))
        distill(run, start, device="cuda", dtype=torch.float32)
        # In two cycles: the second captures anew, from the weights of the first.
        for tokens in (1024, 3072):
            changed = config.updated({"graphs": graphs})
            folder = finalize(run, placement, changed, tokens, device="cuda", dtype=torch.float32)
        weights.append(load_file(folder / "mixers.safetensors"))
        losses.append((folder / "training" / "losses.csv").read_text())
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert relative_rmse(weights[1][key], value) < 1e-2, key
    for ours, theirs in zip(*(text.splitlines()[1:] for text in losses), strict=True):
        assert float(ours.split(",")[-1]) == pytest.approx(float(theirs.split(",")[-1]), rel=1e-3)


def test_layers_replayed_from_graphs_train_what_eager_layers_do(tiny_model, text_file, tmp_path):
    config = DistillConfig(
        ridge_tokens=256, align_tokens=0, supernet_tokens=4096, supernet_batch_tokens=256, supernet_lr=1e-3,
        frozen=(), hidden_weight=0.1, sandwich=True, log_every=1,
    )  # fmt: skip
    weights, losses = [], []
    for graphs in (False, True):
        run = Run.create(tmp_path / str(graphs), RunSpec(str(tiny_model), ("A", "W8", "J", "G"), 4, str(text_file), 64))
        net = distill(run, config.updated({"graphs": graphs}), device="cuda", dtype=torch.float32)
        weights.append({group: mixer.state_dict() for group, mixer in net.trained().items()})
        losses.append((run.supernet / "losses.csv").read_text())
    for group, state in weights[0].items():
        for key, value in state.items():
            assert relative_rmse(weights[1][group][key], value) < 1e-2, (group, key)
    for ours, theirs in zip(*(text.splitlines()[1:] for text in losses), strict=True):
        assert float(ours.split(",")[-1]) == pytest.approx(float(theirs.split(",")[-1]), rel=1e-3)
