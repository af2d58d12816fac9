"""TensorBoard gets what the CSVs get, and nothing twice."""

import csv
import sys

import pytest
import torch
import typer

from nasbench.cli import distill_command
from nasbench.core.errors import UserError
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import distill

CONFIG = DistillConfig(
    ridge_tokens=512, align_tokens=512, supernet_tokens=256, align_batch_tokens=128, supernet_batch_tokens=128,
    log_every=2, tensorboard=True,
)  # fmt: skip


def scalars(run, stage):
    """{name: {tokens: value}} of the events of a stage, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.path / "tensorboard" / stage)).Reload()
    return {name: {e.step: e.value for e in found.Scalars(name)} for name in found.Tags()["scalars"]}


def rows(run, stage):
    with (run.supernet / "losses.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["stage"] == stage]


def test_the_numbers_of_the_csv(make_run):
    run = make_run()
    distill(run, CONFIG, dtype=torch.float32)
    for stage in ("align", "supernet"):
        found = scalars(run, stage)
        wanted = rows(run, stage)
        assert wanted
        for row in wanted:
            name = f"{row['name']}/layer 0{row['layer']}" if row["layer"] else "loss"
            assert found[name][int(row["tokens"])] == pytest.approx(float(row["loss"]), rel=1e-6)
        assert sum(map(len, found.values())) == len(wanted) + 2 * len({row["step"] for row in wanted})
        assert all(value > 0 for value in found["tokens per second"].values())


def test_more_tokens_add_to_it(make_run):
    run = make_run()
    distill(run, CONFIG, dtype=torch.float32)
    before = scalars(run, "align")["J/layer 00"]
    distill(run, CONFIG.updated({"align_tokens": 1024}), dtype=torch.float32)
    after = scalars(run, "align")["J/layer 00"]
    assert set(after) == {256, 512, 768, 1024}
    assert {tokens: after[tokens] for tokens in before} == before


def test_nothing_without_being_asked(make_run):
    run = make_run()
    distill(run, CONFIG.updated({"tensorboard": False}), dtype=torch.float32)
    assert not (run.path / "tensorboard").exists()


def test_without_the_package_one_line_and_nothing_begun(tiny_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    app = typer.Typer()
    app.command()(distill_command.command)
    words = ("--out", tmp_path / "run", "--model", tiny_model, "--data", text_file, "--sequence", "32", "--tensorboard")
    with pytest.raises(UserError, match=r"pip install 'nasbench\[tensorboard\]'") as caught:
        app([str(word) for word in words], standalone_mode=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
