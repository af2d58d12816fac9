"""Training on paper against what was measured, and through the commands."""

import json
from pathlib import Path

import pytest

from nasbench.cli.main import run
from nasbench.model.shapes import MODELS
from nasbench.runs import RunSpec
from nasbench.supernet.on_paper import Sums, on_paper
from nasbench.supernet.settings import DistillConfig

REPORTS = Path(__file__).parents[2] / "reports"
SHAPE = MODELS["qwen2.5-1.5b"]
SPACE = RunSpec(SHAPE.name, ("A", "W1152", "J@12x96x256"), SHAPE.num_layers, "", 2048).space
CONFIG = DistillConfig(
    frozen=(), solved=(), documents=False, repeat_share=0.5, most_full=0.5, kl_chunk=4096,
    align_batch_tokens=16384, supernet_batch_tokens=16384,
)  # fmt: skip


def measured(name, **cells):
    rows = json.loads((REPORTS / "training-h200" / name).read_text())
    return next(row for row in rows if all(row[key] == value for key, value in cells.items()))


def test_memory_is_what_an_h200_took():
    """That run kept every trained weight once more in fp32, and its largest sub-network was the first step's, before
    there were moments."""
    peak = measured("qwen2.5-1.5b.json", stage="supernet", recompute=False)["peak_bytes"]
    sums = Sums(SHAPE, SPACE, CONFIG, 2048)
    assert sums.memory_bytes("supernet") + (4 - 8) * sums.trained == pytest.approx(peak, rel=0.02)


def test_speed_is_what_one_and_two_h200s_reached():
    paper = on_paper(SHAPE, SPACE, CONFIG, 2048, "nvidia-h200", [1, 2])
    found = {(stage.cards, stage.stage): stage for stage in paper.stages}
    assert not paper.notes
    for stage in ("align", "supernet"):
        one = measured("qwen2.5-1.5b.json", stage=stage, step_tokens=16384, recompute=False)["tok_s"]
        two = measured("qwen2.5-1.5b-2-gpus.json", stage=stage)["tok_s"]
        assert found[1, stage].tok_s == pytest.approx(one, rel=0.1)
        assert found[2, stage].tok_s == pytest.approx(two, rel=0.1)
        assert found[2, stage].step_tokens == 2 * found[1, stage].step_tokens


def test_shards_share_the_state_and_not_the_activations():
    whole, shared = CONFIG.updated({"recompute": True}), CONFIG.updated({"recompute": True, "shard": True})
    states = [Sums(SHAPE, SPACE, shared, 2048, cards=cards).state_bytes() for cards in (1, 8, 64)]
    fixed = Sums(SHAPE, SPACE, shared, 2048, cards=1 << 40).state_bytes()
    assert states[0] - fixed == pytest.approx(8 * (states[1] - fixed), rel=1e-6)
    assert states[1] - fixed == pytest.approx(8 * (states[2] - fixed), rel=1e-6)
    sums = [Sums(SHAPE, SPACE, config, 2048, cards=8) for config in (whole, shared)]
    assert sums[1].moved_bytes("supernet") > sums[0].moved_bytes("supernet")
    left = [each.memory_bytes("supernet") - each.state_bytes() for each in sums]
    assert left[0] == pytest.approx(left[1], rel=0.3)


@pytest.mark.parametrize(
    ("model", "blocks"),
    [("qwen2.5-1.5b", "W1152 J@12x96x256"), ("qwen2.5-7b", "J@28x96x256"), ("qwen3-30b-a3b", "W1152 J")],
)
def test_a_dry_run_for_cards_that_are_not_here(tmp_path, capsys, model, blocks):
    words = ["distill", "--out", str(tmp_path / "run"), "--model", model, "--blocks", blocks, "--sequence", "2k"]
    words += ["--align-tokens", "1G", "--supernet-seconds", "3600", "--align-batch", "16k", "--supernet-batch", "16k"]
    assert run([*words, "--shard", "--dry-run", "--cards", "1,8,64", "--card", "nvidia-h200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["cards"], row["stage"]) for row in told["stages"]] == [
        (cards, stage) for cards in (1, 8, 64) for stage in ("align", "supernet")
    ]
    one, eight, many = told["stages"][::2]
    assert one["memory_bytes"] > eight["memory_bytes"] > many["memory_bytes"]
    assert one["tok_s"] < eight["tok_s"] < 8 * one["tok_s"]
    assert one["hours"] == pytest.approx(2**30 / one["tok_s"] / 3600)
    assert told["stages"][1]["hours"] == pytest.approx(1.0, rel=0.01)
    assert any("hosts" in note for note in told["notes"])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_put_on_paper_is_one_line(tmp_path, capsys):
    words = ["distill", "--out", str(tmp_path / "run"), "--model", "qwen2.5-1.5b"]
    for more, said in (
        (["--dry-run", "--cards", "1,x"], "bad --cards '1,x'"),
        (["--cards", "8"], "write --dry-run"),
        (["--dry-run", "--cards", "8", "--card", "nvidia-h201"], "did you mean 'nvidia-h200'"),
    ):
        assert run([*words, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_recipe_is_put_on_paper(capsys):
    words = ["run", "smollm2-135m", "--set", "model=qwen2.5-1.5b", "--dry-run", "--cards", "1,8"]
    assert run([*words, "--card", "nvidia-rtx-4090", "--json"]) == 0
    out, _ = capsys.readouterr()
    told = json.loads(out)
    assert told["model"] == "qwen2.5-1.5b"
    assert len(told["stages"]) == 4
    assert any("no training was measured on nvidia-rtx-4090" in note for note in told["notes"])
