"""The commands devices, profile, db and cost: exit codes, one JSON object, one line for what is wrong."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from nasbench.cli.main import run
from nasbench.core.by_device import ByDevice
from nasbench.core.provenance import kernels_version
from nasbench.cost import add_calibration
from nasbench.cost.calibration import calibration_path, read_calibration
from nasbench.cost.end_to_end import EndToEnd
from nasbench.cost.holdout import holdout_path
from nasbench.devices import detect
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.store import SCHEMA, Database, Row, block_cells, columns_of, read_db

CPU = detect("cpu").slug
TINY = ModelSpec("tiny", "llama", 4, 64, 128, 4, 2, 16, 256, 512, 1e4, 1e-5)


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    """No databases but those of the test: neither the user's nor the shipped ones."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("nasbench.cost.files.profiles_dir", lambda: tmp_path / "empty")
    monkeypatch.setattr("nasbench.cost.files.default_db_dir", lambda: tmp_path / "empty")
    monkeypatch.setattr("nasbench.runtime.roofline.BUFFER_BYTES", ByDevice(cpu=1 << 20))
    monkeypatch.setattr("nasbench.runtime.roofline.MATRIX", ByDevice(cpu=128))
    monkeypatch.setattr(MODELS, "_items", {**MODELS._items, "tiny": TINY})


def stdout_json(capsys) -> dict:
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def profile(folder, *more: str) -> int:
    command = "profile --model tiny --blocks AJ --contexts 64,128 --batches 1 --modes decode --device cpu"
    return run([*command.split(), "--budget", "0.001", "--in-process", "--db", str(folder), *more])


def test_profile_then_cost_then_devices(tmp_path, capsys):
    assert profile(tmp_path, "--json") == 0
    summary = stdout_json(capsys)
    assert summary["device"] == CPU
    assert (summary["measured"], summary["skipped"], summary["failed"]) == (11, 0, 0)
    assert profile(tmp_path, "--json") == 0
    assert (stdout_json(capsys)["measured"]) == 0

    cost = ["cost", "2A 2J", "--model", "tiny", "--context", "100", "--db", str(tmp_path), "--json"]
    assert run([*cost, "--profile", CPU]) == 0
    found = stdout_json(capsys)
    wanted = "placement model device context batch decode_tok_s prefill_tok_s step_ms cache_bytes source "
    wanted += "conv_state_bytes step_stderr_ms step_interval_ms prefill_stderr_tok_s calibration_rows j_per_token"
    assert set(wanted.split()) <= set(found)
    assert found["decode_tok_s"] > 0
    assert found["prefill_tok_s"] is None
    low, high = found["step_interval_ms"]
    assert low < found["step_ms"] < high
    assert (found["source"], found["device"], found["placement"]) == ("measured", CPU, "2A 2J")

    assert run(["devices", "--json", "--db", str(tmp_path)]) == 0
    devices = stdout_json(capsys)
    assert devices["profiled"] == [CPU]
    known = {spec["slug"]: spec for spec in devices["known"]}
    assert "DGX B200" in known["nvidia-b200"]["sources"]["bandwidth_gb_s"]
    assert all(len(spec["sources"]) == 4 for spec in known.values())
    assert run(["devices", "--db", str(tmp_path)]) == 0
    assert "GB/s" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert profile(tmp_path / "db", "--dry-run", "--json") == 0
    plan = stdout_json(capsys)
    assert len(plan["points"]) == 7
    assert plan["seconds"] >= 3
    assert not (tmp_path / "db").exists()
    assert profile(tmp_path / "db", "--dry-run") == 0
    assert "7 rows and 4 ceilings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("placement", "model", "mib"),
    [
        ("28A", "qwen3-1.7b", 7168),
        ("28A", "qwen2.5-1.5b", 1792),
        ("5J W 10J W A J W A 2W 2J W J W 4J A 3J", "jet-nemotron-4b", 258),
        ("14J A 4J A 2W 6J", "jet-nemotron-2b", 157.25),
    ],
)
def test_the_cache_needs_no_rows(placement, model, mib, capsys):
    assert run(["cost", placement, "--model", model, "--context", "64k", "--json"]) == 0
    found = stdout_json(capsys)
    assert found["cache_bytes"] == mib * 2**20
    assert (found["decode_tok_s"], found["step_ms"], found["source"]) == (None, None, "none")


@pytest.mark.parametrize(("placement", "batch", "fits"), [("28A", 128, False), ("14J A 4J A 2W 6J", 128, True)])
def test_what_does_not_fit_in_memory_says_so(placement, batch, fits, capsys):
    """28 layers of full attention of 128 sequences of 64k tokens have 240 GB of keys and values."""
    asked = ["cost", placement, "--model", "jet-nemotron-2b", "--context", "64k", "--batch", str(batch)]
    asked += ["--profile", "nvidia-h100-sxm"]
    assert run([*asked, "--json"]) == 0
    found = stdout_json(capsys)
    assert (found["fits"], found["batch"] <= found["largest_batch"]) == (fits, fits)
    # Nothing has a speed that cannot run.
    assert found["decode_tok_s"] is None
    assert ("does not fit" in found["reason"]) is not fits
    assert found["needed_bytes"] > found["cache_bytes"] + found["conv_state_bytes"]
    assert run(asked) == 0
    assert ("DOES NOT FIT in the memory of nvidia-h100-sxm" in capsys.readouterr().out) is not fits


def card_rows(**cells) -> list[Row]:
    """One kind and the shared blocks of the default model at 4k on a card that is not here."""
    blocks = [block_cells(MODELS["smollm2-135m"], name) for name in ("A", "mlp", "embedding", "norm", "head")]
    cells = {"device": "nvidia-rtx-3090", "dtype": "bf16", "p20_us": 9.0, "p50_us": 10.0, "p80_us": 11.0, **cells}
    return [
        Row(**block, batch=batch, context=4096 * (block["block"] == "A"), **cells)
        for block in blocks
        for batch in (1, 1024)
    ]


def test_what_cannot_run_has_no_speed_and_stale_rows_are_named(tmp_path, capsys):
    Database(tmp_path / "nvidia-rtx-3090.csv").merge(card_rows(driver="580.1", kernels="0ld", measured_utc="1"))
    asked = ["cost", "30A", "--model", "smollm2-135m", "--context", "4k", "--profile", "nvidia-rtx-3090"]
    asked += ["--db", str(tmp_path), "--json"]
    assert run([*asked, "--batch", "1024"]) == 0
    found = stdout_json(capsys)
    assert (found["fits"], found["decode_tok_s"], found["step_ms"]) == (False, None, None)
    assert f"the largest batch is {found['largest_batch']}" in found["reason"]
    assert run([*asked, "--batch", str(found["largest_batch"])]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["decode_tok_s"] > 0
    assert json.loads(captured.out)["stale"] == ["A", "embedding", "head", "mlp", "norm"]
    assert "stale: the rows of A, embedding" in captured.err
    fresh = card_rows(driver="580.1", kernels=kernels_version(), measured_utc="2")
    Database(tmp_path / "nvidia-rtx-3090.csv").merge(fresh)
    assert run(asked) == 0
    assert stdout_json(capsys)["stale"] == []


def test_a_known_device_needs_no_profile(capsys):
    asked = ["cost", "30A", "--model", "smollm2-135m", "--context", "4k", "--profile", "nvidia-rtx-3090", "--json"]
    assert run(asked) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["device"], found["fits"], found["decode_tok_s"]) == ("nvidia-rtx-3090", True, None)
    assert "no speed" in captured.err


def test_memory_of_an_unknown_device_is_not_known(tmp_path, capsys):
    row = {"block": "A", "context": 1024, "p20_us": 1.0, "p50_us": 2.0, "p80_us": 3.0}
    Database(tmp_path / "elsewhere.csv").merge([Row(device="elsewhere", **row)])
    asked = ["cost", "30A", "--model", "smollm2-135m", "--context", "4k", "--db", str(tmp_path)]
    assert run([*asked, "--profile", "elsewhere", "--json"]) == 0
    found = stdout_json(capsys)
    assert (found["fits"], found["decode_tok_s"]) == (None, None)
    assert "no decode time of block embedding" in found["reason"]
    assert run([*asked, "--json"]) == 0
    assert stdout_json(capsys)["fits"] is True


def test_without_rows_it_says_how_to_measure(capsys):
    assert run(["cost", "28A", "--model", "qwen3-1.7b", "--context", "4k"]) == 0
    captured = capsys.readouterr()
    assert "cache" in captured.out
    assert "nasbench profile --model qwen3-1.7b" in captured.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["cost", "28A", "--model", "qwen3-1.7b", "--context", "512k"], "context 524288"),
        (["cost", "27A", "--model", "qwen3-1.7b", "--context", "4k"], "27 layers, the model has 28"),
        (["cost", "28Q", "--model", "qwen3-1.7b", "--context", "4k"], "unknown layer kind 'Q'"),
        (["cost", "28A", "--model", "qwen4", "--context", "4k"], "unknown model 'qwen4'"),
        (["cost", "28A", "--model", "qwen3-1.7b", "--context", "4k", "--profile", "nope"], "nope"),
        (["cost", "28A", "--model", "qwen3-1.7b", "--context", "4k", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["cost", "28A", "--model", "qwen3-1.7b", "--context", "4x"], "bad size '4x'"),
        (["profile", "--model", "smollm2-135m", "--modes", "train"], "unknown mode 'train'"),
        (["profile", "--model", "smollm2-135m", "--contexts", "16k"], "context 16384"),
        (["profile", "--model", "smollm2-135m", "--batches", "none"], "bad size 'none'"),
        (["db", "check", "absent.csv"], "no such profile database"),
    ],
)
def test_bad_input_is_one_line(args, said, capsys):
    assert run(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_estimates_are_marked_and_give_way_to_measurements(tmp_path, capsys, monkeypatch):
    shipped = tmp_path / "shipped"
    known = card_rows(device="nvidia-h200", gb_s=1000.0, tflop_s=10.0)
    Database(shipped / "nvidia-h200.csv").merge(known)
    monkeypatch.setattr("nasbench.cost.files.profiles_dir", lambda: shipped)
    db = str(tmp_path / "mine")
    cost = ["cost", "30A", "--model", "smollm2-135m", "--context", "4k", "--device", "nvidia-rtx-3090"]
    command = ["db", "estimate", "--from", "nvidia-h200", "--to", "nvidia-rtx-3090", "--db", db]
    assert run(cost) == 0
    assert "`nasbench db estimate --from nvidia-h200 --to nvidia-rtx-3090`" in capsys.readouterr().err
    assert run([*command, "--json"]) == 0
    summary = stdout_json(capsys)
    assert (summary["source"], summary["estimated"], summary["measured"]) == ("estimated", len(known), 0)
    path = tmp_path / "mine" / "nvidia-rtx-3090.csv"
    rows = read_db(path)
    assert {row.source for row in rows} == {"estimated"}
    assert all("nvidia-h200" in row.reason for row in rows if row.p50_us)
    assert run(["db", "show", db]) == 0
    assert "ESTIM" in capsys.readouterr().out
    cost += ["--db", db]
    assert run(cost) == 0
    assert "ESTIMATED" in capsys.readouterr().out
    assert run([*cost, "--json"]) == 0
    assert stdout_json(capsys)["source"] == "estimated"
    # Someone measures one of the rows: a new estimate leaves it alone, and can be checked against it.
    real = replace(rows[0], source="measured", p20_us=1.0, p50_us=1.0, p80_us=1.0)
    Database(path).merge([real])
    assert run([*command, "--json"]) == 0
    assert stdout_json(capsys)["measured"] == 1
    assert real in read_db(path)
    assert run([*command, "--check", str(tmp_path / "check")]) == 0
    assert "all" in capsys.readouterr().out
    assert sorted(p.suffix for p in (tmp_path / "check").iterdir()) == [".csv", ".md"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--from nvidia-h200 --to nvidia-rtx-3080", "unknown device 'nvidia-rtx-3080': choose from"),
        ("--from nvidia-h200 --to nvidia-rtx-3090", "nothing to estimate from"),
        ("--from intel --to nvidia-rtx-3090", "unknown device 'intel'"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(options, said, tmp_path, capsys):
    assert run(["db", "estimate", *options.split(), "--db", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_an_older_database_is_migrated(tmp_path, capsys):
    times = {"p20_us": 1.0, "p50_us": 2.0, "p80_us": 3.0}
    path = tmp_path / "one.csv"
    Database(path).merge([Row(device="one", block="A", context=1024, noisy=True, **times)])
    now = path.read_text()
    lines = list(csv.DictReader(path.open()))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns_of(1), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerow(lines[0] | {"schema": "1"})
    assert run(["db", "check", str(path)]) == 0
    assert f"schema 1: `nasbench db migrate {path}` brings it to {SCHEMA}" in capsys.readouterr().out
    assert run(["db", "migrate", str(tmp_path)]) == 0
    assert f"schema 1 became {SCHEMA}" in capsys.readouterr().out
    assert path.read_text() == now
    assert run(["db", "migrate", str(path)]) == 0
    assert "already" in capsys.readouterr().out


def test_db_commands(tmp_path, capsys):
    times = {"p20_us": 1.0, "p50_us": 2.0, "p80_us": 3.0}
    one = Row(device="one", block="A", context=1024, measured_utc="2026-01-01T00:00:00Z", **times)
    two = replace(one, device="two")
    Database(tmp_path / "one.csv").merge([one, two])
    assert run(["db", "check", str(tmp_path)]) == 2
    assert "rows of two" in capsys.readouterr().err
    assert run(["db", "merge", str(tmp_path / "one.csv"), "--db", str(tmp_path / "sorted")]) == 0
    capsys.readouterr()
    assert read_db(tmp_path / "sorted" / "one.csv") == [one]
    assert read_db(tmp_path / "sorted" / "two.csv") == [two]
    assert run(["db", "check", str(tmp_path / "sorted")]) == 0
    assert "1 rows (1 ok), 0 estimated" in capsys.readouterr().out
    for command in (["check"], ["migrate"], ["merge", "--db", str(tmp_path / "again")]):
        assert run(["db", *command, str(tmp_path / "sorted" / "one.csv"), "--json"]) == 0
        assert len(stdout_json(capsys)["files"]) == 1
    assert run(["db", "show", str(tmp_path / "sorted"), "--json"]) == 0
    assert [row["device"] for row in stdout_json(capsys)["rows"]] == ["one", "two"]

    broken = tmp_path / "sorted" / "one.csv"
    broken.write_text(broken.read_text().replace("2.0000", "soon"))
    assert run(["db", "check", str(broken)]) == 2
    assert "line 2 column p50_us: bad value 'soon'" in capsys.readouterr().err


def test_rows_fit_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["db", "show", str(Path(__file__).parents[2] / "profiles" / "nvidia-h200.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["block", "mode", "batch", "context", "chunk", "p50_us"] for line in lines)


def test_merge_writes_only_into_its_folder(tmp_path, capsys):
    path = tmp_path / "one.csv"
    Database(path).merge([Row(device="one", block="A", context=1024, p20_us=1.0, p50_us=2.0, p80_us=3.0)])
    path.write_text(path.read_text().replace(",one,", ",../escaped,"))
    assert run(["db", "merge", str(path), "--db", str(tmp_path / "a" / "b")]) == 2
    assert "line 2 column device: bad device name '../escaped'" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*.csv")) == ["one.csv"]


@pytest.mark.parametrize("command", ["profile", "throughput"])
def test_help_says_the_default_chunk(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run([command, "--help"]) == 0
    assert "default: 512 on a CPU, 8k on a GPU" in " ".join(capsys.readouterr().out.split())


def test_a_holdout_is_measured_once_and_calibrates_nothing(tmp_path, capsys, monkeypatch):
    real = EndToEnd.measure
    monkeypatch.setattr(EndToEnd, "measure", lambda self, point, chunk=None: real(self, point, 0.01, chunk))
    command = "profile --model tiny --blocks AJ --contexts 64 --batches 1,4 --chunk 64 --device cpu --in-process"
    command += f" --budget 0.001 --db {tmp_path} --json --calibrate --holdout 2"
    assert run(command.split()) == 0
    first = stdout_json(capsys)
    assert first["calibration"] > 0
    held_out = read_calibration(holdout_path(tmp_path / f"{CPU}.csv"))
    calibrated = read_calibration(calibration_path(tmp_path / f"{CPU}.csv"))
    assert {row.mode for row in held_out} == {"decode", "prefill"}
    assert not {row.key[:7] for row in held_out} & {row.key[:7] for row in calibrated}
    found = first["holdout"]
    # More sequences than were profiled are covered in prefill only.
    assert found["prefill"]["points"] + found.get("decode", {"points": 0})["points"] + found["not_covered"] == len(
        held_out
    )
    assert found["prefill"]["mean_error"] >= 0
    assert run(command.split()) == 0
    assert stdout_json(capsys)["calibration"] == 0
    assert read_calibration(holdout_path(tmp_path / f"{CPU}.csv")) == held_out


def test_a_profile_of_steps_alone_calibrates_steps_and_predicts_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MODELS, "_items", {**MODELS._items, "tiny": TINY})
    command = "profile --model tiny --blocks AJ --contexts 64 --batches 2 --modes decode --device cpu --in-process"
    assert run(f"{command} --budget 0.001 --db {tmp_path} --json --calibrate".split()) == 0
    path = calibration_path(tmp_path / f"{CPU}.csv")
    assert {row.mode for row in read_calibration(path)} == {"decode"}
    # A prompt that an earlier version measured beside them says nothing here, and stands in nothing's way.
    add_calibration(path, [replace(read_calibration(path)[0], mode="prefill", chunk=32)])
    capsys.readouterr()
    assert run(f"cost 2A2J --model tiny --profile {CPU} --context 64 --batch 2 --db {tmp_path} --json".split()) == 0
    assert stdout_json(capsys)["decode_tok_s"] > 0
