"""nasbench models, throughput and generate through the command line's root."""

import json

import pytest

from nasbench.cli.main import run
from nasbench.core.by_device import ByDevice
from nasbench.runtime import roofline as floor

KEYS = {
    "placement", "model", "device", "context", "batch", "decode_tok_s", "prefill_tok_s", "step_ms", "cache_bytes",
    "source", "peak_bytes", "floor_ms", "floor_fraction", "copy_gb_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(floor, "BUFFER_BYTES", ByDevice(cpu=1 << 22))


def test_models_json(capsys):
    assert run(["models", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["default"] == "smollm2-135m"
    models = {model["name"]: model for model in data["models"]}
    assert models["smollm2-135m"]["parameters"] == 134_515_008
    assert models["jet-nemotron-2b"]["placement"] == "14J A 4J A 2W 6J"
    assert [name for name, model in models.items() if model["weights"]] == ["smollm2-135m"]


def test_models_table(capsys):
    assert run(["models"]) == 0
    assert "qwen3-1.7b" in capsys.readouterr().out


def test_throughput_json(capsys):
    command = "throughput --model smollm2-135m --context 256 --batch 1 --device cpu --dtype bf16 --no-prefill --json"
    assert run([*command.split(), "A 28W A"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert set(data) >= KEYS
    assert data["placement"] == "A 28W A"
    assert data["source"] == "measured"
    assert data["prefill_tok_s"] is None
    assert "decode: 1 sequences" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["30A", "--model", "smollm3", "--context", "1k"], 2, "did you mean 'smollm2-135m'"),
        (["30A", "--model", "default", "--context", "16k"], 2, "context 16384 is beyond smollm2-135m's"),
        (["29A", "--model", "default", "--context", "1k"], 2, "29 layers, the model has 30"),
        (["29A Z", "--model", "default", "--context", "1k"], 2, "unknown layer kind 'Z'"),
        (["30A", "--model", "default", "--context", "much"], 2, "bad size 'much'"),
        (["30A", "--model", "default", "--context", "1k", "--batch", "many"], 2, "bad batch 'many'"),
        (["30A", "--model", "default", "--context", "1k", "--dtype", "int3"], 2, "unknown dtype 'int3'"),
        (["30A", "--model", "default", "--context", "1k", "--device", "tpu"], 2, "unknown torch device 'tpu'"),
    ],
)
def test_throughput_bad_input(capsys, arguments, code, message):
    assert run(["throughput", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_throughput_without_a_gpu(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["throughput", "30A", "--model", "default", "--context", "1k", "--device", "cuda"]) == 1
    assert "is not there" in capsys.readouterr().err


def test_generate(capsys):
    assert run(["generate", "default", "--prompt", "The capital of France is", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith(" Paris")
    words = ["generate", "default", "--prompt", "The capital of France is", "--stop", ".", "--json"]
    assert run([*words, "--max-new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith(" Paris")


def test_generate_bad_input(capsys):
    assert run(["generate", "qwen3-1.7b", "--prompt", "x"]) == 2
    assert "without weights" in capsys.readouterr().err
    assert run(["generate", "./absent", "--prompt", "x"]) == 2
    assert "no such model folder: ./absent" in capsys.readouterr().err
    assert run(["generate", "default", "--prompt", ""]) == 2
    assert "empty prompt" in capsys.readouterr().err
    assert run(["generate", "default", "--prompt", "x", "--max-new-tokens", "9000"]) == 2
    assert "beyond smollm2-135m's" in capsys.readouterr().err
