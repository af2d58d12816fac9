"""`nasbench search` on a tiny run with made-up profile rows."""

import json

import pytest
import torch
from made_up_rows import profile_rows
from supernet_tiny import LAYERS, SHAPE, save_supernet, save_tiny

from nasbench.api import recommend
from nasbench.checkpoints.load import load_model
from nasbench.devices import detect
from nasbench.report.facts import collect
from nasbench.runs import Run, RunSpec
from nasbench.search.trials import best_of, read_front, read_trials
from nasbench.search.validation import read_validation, validate
from nasbench.store import Database, Row
from nasbench.supernet.supernet import Supernet


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(run with an untrained supernet, folder of profile databases)."""
    model = save_tiny(tmp_path_factory.mktemp("model") / "tiny")
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text("\n\n".join(f"the state of layer {i} holds a key and a value of token {i * 7}" for i in range(900)))
    run = Run.create(
        tmp_path_factory.mktemp("runs") / "run", RunSpec(str(model), ("A", "W8", "J"), LAYERS, str(text), 32)
    )
    save_supernet(Supernet(load_model(str(model)), run.spec.space), run.supernet)
    db = tmp_path_factory.mktemp("db")
    Database(db / "test-device.csv").merge(profile_rows())
    Database(db / "guess.csv").merge(profile_rows("estimated", "guess"))
    return run, db


def search(prepared, *arguments, profile="test-device"):
    from nasbench.cli.main import run

    folder, db = prepared
    shared = ["--profile", profile, "--db", str(db), "--context", "128", "--batch", "2", "--device", "cpu"]
    sizes = ["--search-tokens", "256", "--test-tokens", "256"]
    return run(["search", str(folder.path), *shared, *sizes, *arguments])


def test_beam_then_optuna(prepared, capsys):
    run = prepared[0]
    assert search(prepared, "--strategy", "beam", "-k", "1,2", "--evaluations", "12", "--json") == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert [pair["k"] for pair in data["comparisons"]] == [1, 2]
    assert "layer evaluations instead of" in data["notes"][0]
    assert all(pair["searched"]["kl"] <= pair["uniform"]["kl"] for pair in data["comparisons"])
    assert data["target"] == {"device": "test-device", "context": 128, "batch": 2, "dtype": "bf16"}
    front = read_front(run.front)
    assert [row.placement for row in front] == [row["placement"] for row in data["front"]]
    assert all(row.loss_test > 0 for row in front)
    assert {"teacher", "uniform", "beam"} <= {trial.strategy for trial in read_trials(run.trials)}
    assert (run.path / "importance.csv").is_file()
    full = next(trial for trial in read_trials(run.trials) if trial.placement == "4A")
    assert full.cache_bytes == SHAPE.cache_bytes(("A",) * 4, 2, 128)

    assert search(prepared, "--strategy", "optuna", "-k", "1,2", "--evaluations", "10") == 0
    text = capsys.readouterr().out
    assert "searched against uniform" in text
    assert "Pareto front" in text
    assert "hypervolume" in text


def test_dry_runs_say_what_would_be_done_and_write_nothing(prepared, capsys):
    from nasbench.cli.main import run

    folder, db = prepared
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert search(prepared, "-k", "1", "--max", "kl=0.5", "--evaluations", "9", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["full_attention"], told["limits"], told["evaluations"]) == ([1], ["--max kl=0.5"], 9)
    assert told["target"] == "test-device, context 128, batch 2, bf16"
    assert search(prepared, "--dry-run") == 0
    assert "strategy: beam" in capsys.readouterr().out
    words = ["eval", str(folder.path), "--device", "cpu", "--dry-run", "--json"]
    assert run([*words, "--tasks", "kl,retrieval@96:4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["placement"], told["tasks"]) == ("4A", ["kl", "retrieval@96:4"])
    listed = db.parent / "listed.txt"
    listed.write_text("2W J A\n3J A\n")
    assert run([*words, "--placements", str(listed), "--tasks", "retrieval@96:4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["placements"], told["tasks"]) == (["2W8 J A", "3J A"], ["loss", "kl", "retrieval@96:4"])
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before


def test_what_validate_would_measure(prepared, tmp_path, capsys):
    from nasbench.cli.main import run

    slug = detect("cpu").slug
    Database(tmp_path / f"{slug}.csv").merge(profile_rows(device=slug))
    here = (prepared[0], tmp_path)
    assert search(here, "-k", "1", "--evaluations", "4", profile=slug) == 0
    capsys.readouterr()
    words = ["validate", str(here[0].path), "--placements", "3", "--device", "cpu", "--dry-run"]
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["target"], told["left"]) == (f"{slug}, context 128, batch 2, bf16", 3)
    assert told["placements"][0] == "4A"
    assert run(words) == 0
    assert f"seconds: {told['seconds']:.0f}" in capsys.readouterr().out
    assert not here[0].validation.exists()
    # What the report may recommend at a K is measured, and so is the best by the search's objective.
    front = {row.placement for row in read_front(here[0].front) if row.device == slug}
    assert front
    assert run(["validate", str(here[0].path), "--device", "cpu", "--dry-run", "--json"]) == 0
    best = best_of([trial for trial in read_trials(here[0].trials) if trial.k == 1 and trial.target.device == slug])
    assert {*front, best.placement} <= set(json.loads(capsys.readouterr().out)["placements"])


def test_json_is_all_that_stands_on_standard_output(prepared, capfd):
    """Also of the process's own standard output, where solvers print."""
    for strategy in ("exact", "optuna"):
        assert search(prepared, "--strategy", strategy, "-k", "1", "--evaluations", "4", "--json") == 0
        data = json.loads(capfd.readouterr().out)
        assert data["objective"] == "kl"


def test_limits_make_k_an_outcome(prepared, capsys):
    """Limits on two devices and on a task; the front and the answer keep to them, and say what they cost."""
    limits = ["--max", "cache=40k@256,1", "--min", "decode_tok_s=100@guess,64,1", "--max", "loss=99"]
    for strategy in ("beam", "exact", "optuna"):
        assert search(prepared, "--strategy", strategy, "--evaluations", "10", *limits, "--json") == 0
        data = json.loads(capsys.readouterr().out)
        assert data["best"]["k"] < 4
        assert [row["limit"].split("=")[0] for row in data["limits"]] == ["--max cache", "--min decode_tok_s"]
        assert data["limits"][0]["value"] <= 40 * 1024
        assert {row["k"] for row in data["front"]} <= set(range(4))
        told = [row for row in read_trials(prepared[0].trials) if row.strategy == strategy and row.limits]
        assert told
        assert all("--max loss=99 --min decode_tok_s=100@guess,64,1" in row.limits for row in told)
    fronted = {row.placement: row.excess for row in read_front(prepared[0].front) if row.device == "test-device"}
    assert next(t.excess for t in read_trials(prepared[0].trials) if t.placement == "4A") > 0  # its cache is too large
    verdict = recommend(prepared[0].path, db=prepared[1])
    assert fronted[verdict.point.row.placement] == 0
    assert "It keeps to --max cache=0.0390625MiB@test-device,256,1 --max loss=99 --min" in verdict.sentences[1]
    commands = collect(prepared[0], prepared[1]).commands
    (ours,) = (line for line in commands if "--strategy exact" in line and "--min" in line)
    assert "--full-attention" not in ours
    fast = ["--objective", "decode_tok_s@guess,256,4", "--max", "loss=99", "--strategy", "kl-greedy"]
    assert search(prepared, *fast, "--max", "cache=40k@256,1") == 0
    assert "within the limits: " in capsys.readouterr().out
    assert search(prepared, "--max", "loss=0.001", "--evaluations", "4") == 0
    assert "no placement that was tried keeps to all limits" in capsys.readouterr().out


def test_a_worker_leaves_its_trials_to_the_search_that_shares_its_storage(prepared, tmp_path):
    shared = ["-k", "1,2", "--evaluations", "6", "--storage", f"sqlite:///{tmp_path}/studies.db"]
    assert search(prepared, "--worker", *shared) == 0
    tried = [t.placement for t in read_trials(prepared[0].trials) if t.strategy == "optuna"]
    assert len(tried) >= 6
    assert search(prepared, "--strategy", "optuna", *shared) == 0
    assert [t.placement for t in read_trials(prepared[0].trials) if t.strategy == "optuna"] == tried


def test_finalists_are_measured_beside_what_was_predicted(prepared, capsys, monkeypatch):
    here = detect("cpu").slug
    Database(prepared[1] / f"{here}.csv").merge(profile_rows(device=here))
    monkeypatch.setitem(validate.__kwdefaults__, "seconds", 0.05)
    shared = ["-k", "1,2", "--evaluations", "8", "--measure-finalists"]
    assert search(prepared, *shared, "2") == 2
    assert f"--measure-finalists measures on {here}: search for it, not for test-device" in capsys.readouterr().err
    assert search(prepared, *shared, "2", "--json", profile=here) == 0
    data = json.loads(capsys.readouterr().out)
    rows = read_validation(prepared[0].validation)
    assert [row["placement"] for row in data["measured"]] == [row.placement for row in rows]
    assert data["best"]["placement"] in {row.placement for row in rows}
    assert len(rows) == 2
    assert all(row.error == pytest.approx(row.predicted_tok_s / row.measured_tok_s - 1) for row in rows)
    assert search(prepared, *shared, "2", profile=here) == 0
    assert "Predicted against measured" in capsys.readouterr().out


def test_another_objective(prepared, capsys):
    text = "kl+0.5*retrieval-kl@96:3"
    assert search(prepared, "--strategy", "greedy-swap", "-k", "1,2", "--evaluations", "8", "--objective", text) == 0
    out = capsys.readouterr().out
    assert f"Score of {text}, searched against" in out
    rows = [row for row in read_front(prepared[0].front) if row.device == "test-device"]
    assert {row.objective for row in rows} == {text}
    assert rows[0].score == pytest.approx(0, abs=1e-5)


def test_estimated_rows_are_marked(prepared, capsys):
    assert search(prepared, "--strategy", "uniform", "-k", "2", profile="guess") == 0
    text = capsys.readouterr().out
    assert "~" in text
    assert "estimated" in text
    assert {row.source for row in read_front(prepared[0].front) if row.device == "guess"} == {"estimated"}
    assert any(row.device == "test-device" for row in read_front(prepared[0].front))


def test_stale_rows_are_named(prepared, capsys, monkeypatch):
    monkeypatch.setattr(Row, "stale", True)
    assert search(prepared, "--strategy", "uniform", "-k", "2") == 0
    captured = capsys.readouterr()
    assert "stale: the rows of A, J, W8, embedding" in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-k", "5"], "5 full-attention layers asked of 4"),
        (["-k", "x"], "bad --full-attention 'x'"),
        ([], "needs the number of full-attention layers"),
        (["-k", "1", "--strategy", "beems"], "did you mean 'beam'"),
        (["-k", "1", "--replacement", "W9"], "unknown replacement 'W9': choose from J, W8"),
        (["-k", "1", "--profile", "test-devise"], "did you mean 'test-device'"),
        (["-k", "1", "--context", "1k"], "context 1024 is not of tiny"),
        (["-k", "1", "--context", "512"], "nasbench profile"),
        (["-k", "1", "--dtype", "fp16"], "no decode rows of dtype fp16"),
        (["-k", "1", "--db", "/nonexistent"], "/nonexistent"),
        (["-k", "1", "--evaluations", "0"], "evaluations is 0"),
        (["-k", "1", "--objective", "retreival"], "did you mean 'retrieval'"),
        (["--max", "tpot_ms=nan"], "nan is no bound"),
        (["--max", "tpot_ms=0.01"], "tpot_ms=0.01@test-device,128,2 binds"),
        (["--max", "cache=8MiB@1k"], "context 1024 is not of tiny"),
        (["--max", "ttft_ms=3"], "no prefill rows"),
        (["--min", "decode_tok_s=3@64,max"], "the memory of test-device is not known"),
        (["--min", "j_per_token=1@guess"], "no energy is in the profile rows of guess"),
    ],
)
def test_bad_input_is_one_line(prepared, capsys, arguments, message):
    before = prepared[0].trials.read_bytes() if prepared[0].trials.exists() else b""
    assert search(prepared, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nasbench:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert (prepared[0].trials.read_bytes() if prepared[0].trials.exists() else b"") == before


def test_a_folder_that_is_no_run(tmp_path, capsys):
    from nasbench.cli.main import run

    assert run(["search", str(tmp_path), "-k", "1"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_run_remembers_its_target(prepared, capsys):
    from nasbench.cli.main import run

    folder, db = prepared

    def target(*arguments):
        words = ["search", str(folder.path), "-k", "1", "--evaluations", "8", "--device", "cpu", "--json", *arguments]
        assert run([*words, "--search-tokens", "256", "--test-tokens", "0"]) == 0
        return json.loads(capsys.readouterr().out)["target"]

    (folder.path / "options.json").unlink(missing_ok=True)
    widest = {"device": "test-device", "context": 256, "batch": 4, "dtype": "bf16"}
    assert target("--profile", "test-device", "--db", str(db)) == widest, "the largest that was profiled"
    assert target() == widest
    assert target("--batch", "1") == {**widest, "batch": 1}
    assert target() == {**widest, "batch": 1}
