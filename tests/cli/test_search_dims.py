"""Dimensions of a layer kind that cost alike, measured and trained alike, as a person types it."""

import json

import pandas as pd
import pytest
from supernet_tiny import SHAPE, one_thread, text_file, tiny_model

from nasbench.cli import main
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import UserError
from nasbench.model.shapes import MODELS
from nasbench.report.dims import TABLE_2, dims_table, spreads
from nasbench.search.dims import DimSpace, name_of, placement_of

__all__ = ["one_thread", "text_file", "tiny_model"]

JET = MODELS["jet-nemotron-2b"]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr("nasbench.runtime.roofline.BUFFER_BYTES", ByDevice(cpu=1 << 20))
    monkeypatch.setattr("nasbench.runtime.roofline.MATRIX", ByDevice(cpu=64))


def words(model, out, *more, **changes):
    given = {
        "model": model, "out": out, "blocks": "J", "heads": "2,4", "key-dims": "4,8", "value-dims": "8,16",
        "full-attention": 1, "context": 64, "batch": 2, "device": "cpu", "dtype": "fp32", **changes,
    }  # fmt: skip
    return ["search-dims", *(f"--{name}={value}" for name, value in given.items()), *more]


def test_the_papers_rows_are_the_grid_at_constant_cache():
    space = DimSpace(JET.mixer("J"), "cache", 0.0, 65536, 128, 2, heads=(4, 8, 12))
    assert set(TABLE_2) <= set(space.names())
    assert all(JET.mixer(name).cache_bytes(1, 65536) == 294_912 * 4 for name in space.names())
    table = dims_table(list(TABLE_2), JET, 4, (65536, 128), 2, (), None)
    assert (table["cache MiB"] == 157.25).all()
    # The paper's parameters leave the convolution's generator out.
    for row in table.to_dict("records"):
        spec = JET.mixer(row["kind"])
        generators = spec.generator_size * (JET.hidden_size + spec.values * spec.conv_size) * 26 / 1e6
        assert row["parameters (M)"] - generators == pytest.approx(row["paper: parameters (M)"], rel=0.02)
    assert "Kendall's tau of parameters and paper: maths (%): 0.78" in " ".join(spreads(table))


def test_what_stays_and_what_a_kind_can_have():
    for same in ("cache", "parameters", "latency"):
        for kind in ("J", "G", "K", "M", "H64"):
            spec = JET.mixer(kind)
            space = DimSpace(spec, same, 0.05, 4096, 8, 2, key_dims=(64, 128))
            amounts = [space.amount(JET.mixer(name)) for name in space.names()]
            assert amounts, (same, kind)
            assert all(abs(amount / space.amount(spec) - 1) <= 0.05 for amount in amounts)
    conv = DimSpace(JET.mixer("J"), "cache", 0.0, 4096, 8, 2, (12,), (96,), (256,), (2, 4))
    assert conv.names() == ["J@12x96x256x32x2", "J@12x96x256"]
    for kind, conv_size, told in (("W", 4, "D, G, H"), ("L", 2, "does not exist"), ("J", 9, "sees 2 to 8 tokens")):
        with pytest.raises(UserError, match=told):
            DimSpace(JET.mixer(kind), "cache", 0.0, 4096, 8, 2, conv_sizes=(conv_size,)).names()
    with pytest.raises(UserError, match="did you mean 'cache'"):
        DimSpace(JET.mixer("J"), "cash", 0.0, 4096, 8, 2)
    assert placement_of(JET, "J@4x256x288", 4)[13:15] == ("J@4x256x288", "A")
    assert placement_of(SHAPE, "G@2x4x16", 1).count("A") == 1


def test_dims_measured_then_trained_and_nothing_twice(tiny_model, text_file, tmp_path, capsys):
    out = tmp_path / "dims"
    line = words(tiny_model, out, "--json", **{"key-dims": 8})
    assert main.run(line) == 0, capsys.readouterr().err
    kinds = json.loads(capsys.readouterr().out)["kinds"]
    assert [row["kind"] for row in kinds] == ["J@4x8x8", "J@2x8x16"]
    assert all(row["cache MiB"] == kinds[0]["cache MiB"] and row["prompt tokens/s"] > 0 for row in kinds)
    before = (out / "speeds.csv").read_bytes()
    settings = tmp_path / "settings.toml"
    settings.write_text("ridge_tokens = 256\nalign_batch_tokens = 128\nsupernet_batch_tokens = 128\n")
    training = {"data": text_file, "sequence": 32, "align-tokens": 256, "tokens": 256, "config": settings}
    training |= {"test-tokens": "1k"}
    line += ["--", *(f"--{name}={value}" for name, value in training.items())]
    assert main.run(line) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert (out / "speeds.csv").read_bytes() == before
    table = pd.read_csv(out / "dims.csv")
    assert table["loss"].notna().all()
    assert len(table) == len(found["kinds"]) == 2
    assert "decode tokens/s: " in (out / "dims.md").read_text()
    assert (out / "dims.png").read_bytes().startswith(b"\x89PNG")
    assert main.run([*line[:-1], "--nonsense=1"]) == 2


def test_optuna_chooses_some_and_goes_on(tiny_model, tmp_path, capsys):
    out = tmp_path / "dims"
    for trials in (2, 3):
        assert main.run(words(tiny_model, out, "--json", trials=trials, prompt=0)) == 0, capsys.readouterr().err
        kinds = json.loads(capsys.readouterr().out)["kinds"]
        assert len(kinds) in (trials, trials + 1)
        assert all(row["decode tokens/s"] > 0 for row in kinds)
    assert main.run(words(tiny_model, out, "--json", prompt=0, same="latency", tolerance=0.4)) == 0
    reference, *others = json.loads(capsys.readouterr().out)["kinds"]
    assert reference["kind"] == "J@4x8x8"
    assert all(abs(row["step ms"] / reference["step ms"] - 1) <= 0.4 for row in others)
    assert main.run(words(tiny_model, tmp_path / "late", limit=1e-9)) == 1


def test_a_dry_run_lists_and_wrong_words_are_named(tiny_model, tmp_path, capsys):
    assert main.run(words("jet-nemotron-2b", tmp_path / "dims", "--dry-run", "--json", blocks="table2")) == 0
    assert len(json.loads(capsys.readouterr().out)["kinds"]) == 9
    wrong = ({"same": "cash"}, {"tolerance": 2}, {"blocks": "W4"}, {"batch": 0}, {"heads": 3, "key-dims": 5})
    for change in (*wrong, {"full-attention": 4}, {"context": "1m"}):
        assert main.run(words(tiny_model, tmp_path / "dims", **change)) == 2, change
    assert not (tmp_path / "dims").exists()
    assert name_of(JET.mixer("J")) == "J@12x96x256"
