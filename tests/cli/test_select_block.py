"""Kinds trained and measured alike, as a person types it."""

import json

import pandas as pd
import pytest
from supernet_tiny import one_thread, text_file, tiny_model

from nasbench.cli import main

__all__ = ["one_thread", "text_file", "tiny_model"]


@pytest.fixture
def words(tiny_model, text_file, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text("ridge_tokens = 256\nalign_batch_tokens = 128\nsupernet_batch_tokens = 128\n")
    given = {
        "model": tiny_model, "blocks": "J,W8", "out": tmp_path / "blocks", "full-attention": 1, "data": text_file,
        "sequence": 32, "align-tokens": 256, "tokens": 256, "config": settings, "tasks": "retrieval@64:4",
        "test-tokens": "1k", "context": 64, "batch": 2, "row-seconds": 0.002, "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    return ["select-block", *(f"--{name}={value}" for name, value in given.items())]


def test_one_table_of_kinds_trained_alike(words, tmp_path, capsys):
    assert main.run([*words, "--json"]) == 0, capsys.readouterr().err
    printed = json.loads(capsys.readouterr().out)
    folder = tmp_path / "blocks"
    table = pd.read_csv(folder / "blocks.csv")
    assert list(table["kind"]) == [row["kind"] for row in printed["kinds"]] == ["A", "J", "W8"]
    assert list(table["placement"]) == ["4A", "2J A J", "2W8 A W8"]
    assert table["loss"].notna().all()
    assert table["retrieval@64:4"].between(0, 1).all()
    model, *others = table.to_dict("records")
    assert model["kl"] == pytest.approx(0, abs=1e-6)
    assert all(row["kl"] > 0 and row["training tokens/s"] > 0 for row in others)
    assert (table[["decode tokens/s", "prompt tokens/s"]] > 0).all(axis=None)
    assert (folder / "blocks.png").read_bytes().startswith(b"\x89PNG")
    assert "| J | JetBlock |" in (folder / "blocks.md").read_text()
    state = json.loads((folder / "pipeline.json").read_text())["stages"]
    trained = [command for command in state if "nasbench distill" in command]
    assert len(trained) == 2
    assert all("frozen=[]" in command for command in trained), "windows learn, too"

    assert main.run([*words, "--json"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out) == printed
    assert again.err.count("done before") == len(state)


def test_a_dry_run_leaves_nothing(words, tmp_path, capsys):
    assert main.run([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("nasbench finalize") == 2
    assert not (tmp_path / "blocks").exists()
    assert main.run([*words, "--blocks=A"]) == 2
    assert main.run([*words, "--full-attention=9"]) == 2
