"""distill, eval and finalize as a person types them. The commands are called through an app of their own, so that the
tests need no other command."""

import json
import shutil
import subprocess
import sys

import pytest
import typer
from safetensors.torch import load_file, save_file
from supernet_tiny import one_thread, text_file, tiny_model

from nasbench.cli import corpus_command, distill_command, eval_command, finalize_command
from nasbench.core.errors import NasbenchError, UserError
from nasbench.core.files import sole_writer
from nasbench.data.self_corpus import writing_alone
from nasbench.supernet import checkpoint

__all__ = ["one_thread", "text_file", "tiny_model"]

app = typer.Typer()
for name, module in (("distill", distill_command), ("eval", eval_command), ("finalize", finalize_command)):
    app.command(name)(module.command)
app.add_typer(corpus_command.command, name="corpus")


@pytest.fixture
def nas(capsys):
    def call(*args):
        app([str(arg) for arg in args], standalone_mode=False)
        return capsys.readouterr()

    return call


@pytest.fixture
def distill_args(tiny_model, text_file, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text("ridge_tokens = 512\nalign_batch_tokens = 128\nsupernet_batch_tokens = 128\n")
    return (
        *("distill", "--model", tiny_model, "--out", tmp_path / "run", "--blocks", "W8,J", "--config", settings),
        *("--data", text_file, "--align-tokens", "512", "--supernet-tokens", "256", "--sequence", "32"),
        *("--device", "cpu", "--dtype", "fp32"),
    )


def test_distill_eval_finalize(nas, distill_args, tmp_path):
    run = tmp_path / "run"
    out = json.loads(nas(*distill_args, "--json").out)
    assert out["names"] == ["A", "W8", "J"]
    assert json.loads(nas(*distill_args, "--json").out) == out

    common = ("--device", "cpu", "--dtype", "fp32", "--json")
    scored = json.loads(nas("eval", run, "--placement", "2J W8 A", "--tasks", "loss,kl,retrieval@128:2", *common).out)
    assert scored["placement"] == "2J W8 A"
    assert list(scored["scores"]) == ["loss", "kl", "retrieval@128:2"]
    assert scored["scores"]["kl"]["value"] > 0
    full = json.loads(nas("eval", run, "--tasks", "kl", *common).out)
    assert full["placement"] == "4A"
    assert abs(full["scores"]["kl"]["value"]) < 1e-6
    assert "nats" in nas("eval", run, "--device", "cpu", "--dtype", "fp32").out

    final = json.loads(nas("finalize", run, "--placement", "2J W8 A", "--tokens", "512", *common).out)
    assert final["tokens"] == 512
    args = ("--data", distill_args[10], "--sequence", "32", "--tasks", "loss,kl,agreement@6")
    again = json.loads(nas("eval", final["folder"], *args, *common).out)
    assert again["placement"] == "2J W8 A"
    assert 0 <= again["scores"]["agreement@6"]["value"] <= 1
    assert again["scores"]["kl"]["value"] < scored["scores"]["kl"]["value"]
    assert "average" not in final
    args_again = ("--placement", "2J W8 A", "--tokens", "512", "--average", "0.5")
    both = json.loads(nas("finalize", run, *args_again, *common).out)
    assert both["folder"] == final["folder"]
    mean = json.loads(nas("eval", both["average"], *args, *common).out)
    assert mean["placement"] == "2J W8 A"
    assert mean["scores"] != again["scores"]
    chosen = json.loads(nas("finalize", run, *args_again[:-1], "auto", *common).out)
    assert chosen["losses_by_share"][str(chosen["share"])] == min(chosen["losses_by_share"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--blocks", "Q"), "unknown layer kind 'Q'"),
        (("--blocks", "A"), "no layer kind beside full attention"),
        (("--blocks", "J@3x"), "bad"),
        (("--align-tokens", "many"), "bad size"),
        (("--dtype", "fp16"), "fp16 cannot train"),
        (("--dtype", "fp8"), "unknown dtype"),
        (("--device", "tpu"), "unknown torch device"),
        (("--sequence", "4k"), "beyond the context"),
        (("--data", "absent.txt"), "no such data"),
        (("--config", "absent.toml"), "no such file"),
        (("--shard",), "needs torchrun: start with `torchrun"),
        (("--shard", "--dry-run"), "needs torchrun"),
        (("--supernet-seconds", "-1"), "bad --supernet-seconds"),
        (("--set", "whol=true"), "did you mean 'whole'"),
        (("--set", "whole=maybe"), "bad --set"),
    ],
)
def test_bad_input_of_distill(nas, distill_args, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        nas(*distill_args, *changes)
    assert "\n" not in str(caught.value)


def test_another_specification_is_refused(nas, distill_args):
    nas(*distill_args)
    with pytest.raises(UserError, match="another names"):
        nas(*distill_args, "--blocks", "J")
    with pytest.raises(UserError, match="another align_tokens 512"):
        nas(*distill_args, "--align-tokens", "256")


def test_bad_input_of_eval_and_finalize(nas, distill_args, tmp_path, tiny_model, text_file):
    nas(*distill_args)
    run = tmp_path / "run"
    for args, message in [
        (("eval", run, "--placement", "4G"), "unknown layer kind at layer 0"),
        (("eval", run, "--placement", "3J"), "3 layers, the model has 4"),
        (("eval", run, "--tasks", "los"), "did you mean 'loss'"),
        (("eval", run, "--split", "train"), "unknown split"),
        (("eval", run, "--data", text_file), "run's own"),
        (("eval", tiny_model, "--placement", "4J", "--data", text_file), "others need a run folder"),
        (("eval", tiny_model, "--tasks", "loss,agreement", "--data", text_file), "agreement needs a teacher"),
        (("eval", tmp_path / "absent"), "absent"),
        (("finalize", tmp_path / "absent", "--placement", "4J"), "not a run folder"),
        (("finalize", run, "--placement", "4G"), "unknown layer kind at layer 0"),
        (("finalize", run, "--placement", "4J", "--shard"), "needs torchrun"),
        (("finalize", run, "--placement", "4J", "--average", "1.5"), "bad --average '1.5': choose auto or 0 to 1"),
        (("finalize", run), "write either --placement or --full-attention K"),
        (("finalize", run, "-k", "1", "--placement", "4J"), "write either"),
        (("finalize", run, "-k", "1"), "has no trials"),
        (("finalize", run, "--placement", "4J", "--seconds", "-1"), "bad --seconds"),
        (("finalize", run, "--placement", "4J", "--variant", "../x"), "bad --variant '../x': write letters"),
        (("eval", run, "--placements", "auto"), "has no trials"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            nas(*args, "--device", "cpu")
        assert "\n" not in str(caught.value)


def test_a_run_remembers_what_it_was_trained_with(nas, distill_args, tmp_path):
    run = tmp_path / "run"
    first = json.loads(nas(*distill_args, "--json").out)
    assert json.loads(nas("distill", "--out", run, "--device", "cpu", "--json").out) == first
    grown = json.loads(nas("distill", "--out", run, "--supernet-tokens", "512", "--device", "cpu", "--json").out)
    assert grown["version"] != first["version"]
    settings = checkpoint.latest(run / "supernet").state["settings"]
    assert (settings["align_tokens"], settings["supernet_tokens"], settings["dtype"]) == (512, 512, "float32")
    told = json.loads(nas("finalize", run, "--placement", "2W J A", "--tokens", "256", "--device", "cpu", "--json").out)
    assert told["placement"] == "2W8 J A", "W is the run's only window"
    assert json.loads((run / "final" / "2W8-J-A" / "final.json").read_text())["settings"]["dtype"] == "float32"


def test_what_finalize_would_do(nas, distill_args, tmp_path):
    nas(*distill_args)
    run = tmp_path / "run"
    before = sorted(run.rglob("*"))
    args = ("finalize", run, "--placement", "2W J A", "--tokens", "256", "--device", "cpu", "--dry-run")
    told = json.loads(nas(*args, "--json").out)
    assert (told["placement"], told["tokens"], told["tokens_of_a_step"]) == ("2W8 J A", 256, 128)
    assert told["seconds"] > 0
    assert "placement: 2W8 J A" in nas(*args).out
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("changes", [("--data", "absent.txt"), ("--sequence", "512", "--data", "short.txt")])
def test_a_refused_distill_leaves_no_folder(nas, distill_args, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match=r"no such data|too little text"):
        nas(*distill_args, *changes)
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_train_one_run(nas, distill_args, tmp_path):
    nas(*distill_args)
    script = "import sys; from nasbench.cli.main import run; sys.exit(run(sys.argv[1:]))"
    words = [str(word) for word in distill_args]
    with sole_writer(tmp_path / "run", "distills"):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "another process distills in" in done.stderr


@pytest.mark.parametrize("command", ["distill", "eval"])
def test_a_model_of_broken_numbers_is_named(nas, distill_args, tiny_model, tmp_path, command):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    for value, message in ((float("nan"), "holds values that are not finite"), (1e38, "not finite")):
        weights["model.layers.2.mlp.down_proj.weight"][0, 0] = value
        save_file(weights, broken / "model.safetensors")
        on_cpu = ["--data", distill_args[10], "--sequence", "32", "--device", "cpu", "--dtype", "fp32"]
        words = [*distill_args[1:], "--model", broken] if command == "distill" else [broken, *on_cpu]
        with pytest.raises(NasbenchError, match=message) as caught:
            nas(command, *words)
        assert "layers.2" in str(caught.value)
        assert "lr" not in str(caught.value)
        assert not list((tmp_path / "run").rglob("*.csv"))


def test_dry_run_says_what_is_left_and_writes_nothing(nas, distill_args, tmp_path):
    run = tmp_path / "run"
    found = json.loads(nas(*distill_args, "--dry-run", "--json").out)
    assert not run.exists()
    assert [(stage["stage"], stage["tokens"], stage["steps"]) for stage in found["stages"]] == [
        ("ridge", 1024, 1), ("align", 512, 4), ("supernet", 256, 2),
    ]  # fmt: skip
    assert all(stage["tok_s"] > 0 and stage["seconds"] > 0 for stage in found["stages"])
    assert found["peak_bytes"] > found["training_bytes"] > found["model_bytes"] > 0
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    nas(*distill_args)
    assert json.loads(nas(*distill_args, "--dry-run", "--json").out)["stages"] == []
    more = json.loads(nas(*distill_args, "--supernet-tokens", "768", "--dry-run", "--json").out)
    assert [(stage["stage"], stage["tokens"]) for stage in more["stages"]] == [("supernet", 512)]
    assert "minutes" in nas(*distill_args, "--supernet-tokens", "768", "--dry-run").err


def test_the_model_writes_what_it_is_distilled_on(nas, distill_args, tiny_model, tmp_path):
    corpus = tmp_path / "self.jsonl"
    args = ("--model", tiny_model, "--tokens", "4k", "--length", "64", "--batch", "16", "--device", "cpu", "--json")
    out = json.loads(nas("corpus", "generate", *args, "--dtype", "fp32", "--out", corpus).out)
    assert out["tokens"] >= 4096
    with writing_alone(corpus), pytest.raises(UserError, match=r"another process writes .*self\.jsonl: choose another"):
        nas("corpus", "generate", *args, "--dtype", "fp32", "--out", corpus)
    assert json.loads(nas(*distill_args, "--data", corpus, "--json").out)["names"] == ["A", "W8", "J"]
    with pytest.raises(UserError, match="bad temperature 0"):
        nas("corpus", "generate", *args, "--out", corpus, "--temperature", "0")
