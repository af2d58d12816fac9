"""benchmarks/ablations.py on a tiny model: values beside an independent evaluation, what is not done again, errors."""

import json
import shutil

import pytest
import torch

import benchmarks.ablations as bench
from benchmarks.ablation_tables import Difference, Results, Row
from nasbench.checkpoints.load import load_model
from nasbench.core.errors import UserError
from nasbench.data.packing import Corpus
from nasbench.evaluation.tasks import Context, parse_task
from nasbench.runs import Run
from nasbench.search.table import read_rows
from nasbench.supernet import checkpoint, train
from nasbench.supernet.supernet import Supernet

SETTINGS = (
    "ridge_tokens = 512\nalign_batch_tokens = 128\nsupernet_batch_tokens = 64\nalign_lr = 1e-3\nsupernet_lr = 5e-4\n"
    "frozen = []\nsolved = []\ndocuments = false\nlog_every = 1\n"
)


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path):
    (tmp_path / "settings.toml").write_text(SETTINGS)
    options = (
        *("measure", "--out", tmp_path / "out", "--model", tiny_model, "--names", "A,W8,J", "--data", text_file),
        *("--align", "512", "--supernet", "256", "--self-tokens", "1k", "--length", "64", "--test-tokens", "1k"),
        *("-k", "2", "--sequence", "32", "--config", tmp_path / "settings.toml", "--device", "cpu", "--dtype", "fp32"),
    )
    return list(map(str, options))


def test_arms_are_measured_compared_and_not_done_twice(arguments, tiny_model, text_file, tmp_path, monkeypatch, capsys):
    out, kept = tmp_path / "out", tmp_path / "kept"
    seen, discard, distil = [], checkpoint.discard, train.distill

    def keep(folder):
        """The weights go once an arm is measured; not from this test."""
        shutil.copytree(folder, kept / folder.parent.name)
        discard(folder)

    def stopped(run, config, **rest):
        if config.supernet_tokens:
            raise KeyboardInterrupt
        return distil(run, config, **rest)

    def noted(run, config, **rest):
        seen.append(run.path.name)
        return distil(run, config, **rest)

    monkeypatch.setattr(checkpoint, "discard", keep)
    monkeypatch.setattr(train, "distill", stopped)
    assert bench.main([*arguments, "--data", str(tmp_path / "absent.txt")]) == 2
    assert bench.main([*arguments, "--arms", "base"]) == 130
    assert list(Results(out).plan["stages"]) == ["base:align"]
    monkeypatch.setattr(train, "distill", noted)
    assert bench.main(arguments) == 0
    assert seen == ["base", "no-transfer", "no-transfer", "self", "self"]

    rows = read_rows(out / "ablations.csv", Row)
    labels = {"all W8": "4W8", "all J": "4J", "2 A, W8": "W8 A W8 A", "2 A, J": "J A J A"}
    assert [(row.arm, row.stage, row.label) for row in rows] == [
        (arm, stage, label) for stage in ("align", "supernet") for arm in bench.ARMS for label in labels
    ]
    assert all(row.placement == labels[row.label] and row.rows == 32 and row.kl > 0 for row in rows)
    assert {(row.stage, row.tokens) for row in rows} == {("align", 512), ("supernet", 768)}
    for row in rows:
        assert row.passes == pytest.approx(row.tokens / row.text_tokens)

    # The last placement's numbers again, from the arm's weights, by the task of `nasbench eval`.
    loaded = load_model(str(tiny_model), dtype=torch.float32)
    corpus = Corpus.load(str(text_file), loaded.tokenizer, 32).without_documents()
    context = Context(loaded.tokenizer, corpus, loaded.decoder, "test", 1024)
    values = {}
    for arm in bench.ARMS:
        shutil.copytree(kept / arm, out / "work" / arm / "supernet", dirs_exist_ok=True)
        net = Supernet.load(Run.open(out / "work" / arm), loaded=loaded)
        sub = net.select(("J", "A", "J", "A"))
        values[arm] = {task: parse_task(task).values(sub, context).double() for task in ("loss", "kl")}
        mine = next(row for row in rows if (row.arm, row.stage, row.label) == (arm, "supernet", "2 A, J"))
        own = parse_task("loss").values(loaded.decoder, context).double()
        assert mine.loss == pytest.approx(float(values[arm]["loss"].mean()), abs=2e-5)
        assert mine.kl == pytest.approx(float(values[arm]["kl"].mean()), abs=2e-5)
        assert mine.kl_se == pytest.approx(float(values[arm]["kl"].std()) / 32**0.5, abs=2e-5)
        assert mine.loss_above_teacher == pytest.approx(float((values[arm]["loss"] - own).mean()), abs=2e-5)
        assert mine.loss_above_teacher_se == pytest.approx(float((values[arm]["loss"] - own).std()) / 32**0.5, abs=2e-5)
    gaps = read_rows(out / "differences.csv", Difference)
    gap = next(row for row in gaps if (row.arm, row.stage, row.label) == ("no-transfer", "supernet", "2 A, J"))
    paired = values["no-transfer"]["kl"] - values["base"]["kl"]
    assert gap.kl == pytest.approx(float(paired.mean()), abs=2e-5)
    assert gap.kl_se == pytest.approx(float(paired.std()) / 32**0.5, abs=2e-5)
    mean = next(row for row in gaps if (row.arm, row.stage, row.label) == ("self", "supernet", "mean of J"))
    of_arm = [
        row.loss for row in gaps if (row.arm, row.stage) == ("self", "supernet") and row.label in ("all J", "2 A, J")
    ]
    assert mean.loss == pytest.approx(sum(of_arm) / len(of_arm))

    written = [json.loads(line)["tokens"] for line in (out / "work" / "self.jsonl").read_text().splitlines()]
    text = (out / "README.md").read_text()
    assert f"wrote {sum(written):,} tokens" in text
    assert f"{mean.loss:+.4f} ± {1.96 * mean.loss_se:.4f}" in text or f"{abs(mean.loss):.4f} ± " in text
    assert f"({gap.kl:+.4f} ± {1.96 * gap.kl_se:.4f})" in text
    assert "nan" not in text.lower()

    # All is there: no model is read; other options are refused; the page is made of the values alone.
    monkeypatch.setattr("nasbench.checkpoints.load.load_model", lambda *_, **__: pytest.fail("done again"))
    assert bench.main([*arguments, "--arms", "self,base"]) == 0
    assert bench.main([*arguments, "--align", "1k"]) == 2
    assert "was begun with another align_tokens" in capsys.readouterr().err
    (out / "ablations.csv").unlink()
    assert bench.main(["report", "--out", str(out)]) == 0
    assert read_rows(out / "ablations.csv", Row) == rows


def test_what_cannot_be_is_told_in_a_line(arguments, tmp_path, capsys):
    for extra, told in (
        (("--arms", "base,no-transfr"), "unknown arm 'no-transfr': choose from base, no-transfer, self; did you mean"),
        (("--arms", ","), "no arm in ','"),
        (("-k", "4"), "bad --full-attention 4: choose 1 to 3"),
        (("--align", "64"), "bad --align 64: a step has 128 tokens"),
        (("--dtype", "fp16"), "dtype fp16 cannot train"),
    ):
        assert bench.main([*arguments, *extra]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nothing measured in"):
        Results(tmp_path / "out")
