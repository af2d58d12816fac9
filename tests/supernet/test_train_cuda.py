"""On a CUDA GPU: alignment replayed from a graph trains what alignment launched kernel by kernel does."""

import pytest
import torch
from tolerances import relative_rmse

from nasbench.runs import Run, RunSpec
from nasbench.supernet import train as train_module
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill

pytestmark = pytest.mark.gpu


class Eager:
    def __init__(self, work, optimizer, sums, tokens):
        self.work = work

    def __call__(self, tokens):
        self.work(tokens)


def test_a_replayed_step_is_the_eager_step(tiny_model, text_file, tmp_path, monkeypatch):
    config = DistillConfig(
        ridge_tokens=256, align_tokens=4096, supernet_tokens=0, align_batch_tokens=256, log_every=4
    )  # fmt: skip
    weights, losses = [], []
    for name in ("graph", "eager"):
        run = Run.create(tmp_path / name, RunSpec(str(tiny_model), ("A", "J", "G"), 4, str(text_file), 64, 0))
        if name == "eager":
            monkeypatch.setattr(train_module, "GraphedStep", Eager)
        net = distill(run, config, device="cuda", dtype=torch.float32)
        weights.append({group: mixer.state_dict() for group, mixer in net.trained().items()})
        losses.append((run.supernet / "losses.csv").read_text())
    assert weights[0].keys() == weights[1].keys()
    for group, state in weights[0].items():
        for key, value in state.items():
            assert relative_rmse(value, weights[1][group][key]) < 1e-2, (group, key)
    for ours, theirs in zip(*(text.splitlines()[1:] for text in losses), strict=True):
        assert float(ours.split(",")[-1]) == pytest.approx(float(theirs.split(",")[-1]), rel=1e-3)
