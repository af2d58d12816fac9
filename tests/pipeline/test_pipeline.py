"""Recipes: what they say, the commands that come out, and that a stopped run continues."""

import json
import string
import tomllib

import pandas as pd
import pytest

from nasbench.cli.main import run
from nasbench.core.errors import UserError
from nasbench.pipeline import Step, plan, prepare, read_recipe, recipe_names, run_steps
from nasbench.report import html
from nasbench.report.svg import Rendered
from nasbench.supernet.settings import DistillConfig

RECIPE = """
title = "Two stages"
[settings]
names = "W,J"
flags = ["--a", "b c"]
counts = "4,8"
[settings.cuda]
names = "J"
[budget]
tokens = "16k"
evaluations = 40
seconds = 30.0
[training]
whole = true
align_batch_tokens = 256
[training.cuda]
align_batch_tokens = 8192
[[stage]]
title = "first with {names}"
command = "first {flags} --names {names} --tokens {tokens} --evaluations {evaluations} --out {out} --data ''"
seconds = { cpu = 5, cuda = 1 }
[[stage]]
title = "second, K = {each}"
command = "second -k {each} --seconds {seconds}"
each = "counts"
makes = "{out}/second-{each}"
seconds = ["seconds"]
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "two.toml").write_text(RECIPE)
    return read_recipe(str(tmp_path / "two.toml"))


def commands(recipe, device="cpu", **changes):
    values = recipe.values(device, changes) | {"out": "o", "device": device}
    return plan(recipe, values)


def test_settings_become_words(recipe):
    first, *others = commands(recipe)
    told = "first --a 'b c' --names W,J --tokens 16k --evaluations 40 --out o --data ''"
    assert first.command == f"nasbench {told}"
    assert [step.words for step in others] == [("second", "-k", k, "--seconds", "30") for k in ("4", "8")]
    assert [step.title for step in others] == ["second, K = 4", "second, K = 8"]
    assert [step.seconds for step in (first, *others)] == [5, 30, 30]
    assert str(others[0].makes) == "o/second-4"
    assert "--names J" in commands(recipe, "cuda:1")[0].command
    assert "--names J,W" in commands(recipe, names="J,W", counts="")[0].command


def test_scale_multiplies_budgets(recipe):
    assert "--tokens 32k --evaluations 80" in commands(recipe, scale="2")[0].command
    small = commands(recipe, scale="0.001")
    assert "--tokens 1k --evaluations 8" in small[0].command
    assert small[1].words[-1] == "0.03"
    assert "--tokens 8k" in commands(recipe, scale="2", tokens="4k")[0].command


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "W"}, "unknown setting 'name': .* did you mean 'names'"),
        ({"scale": "0"}, "bad scale '0': choose a number above 0 and up to 1000"),
        ({"scale": "x"}, "bad scale"),
        ({"tokens": "4q"}, "bad tokens '4q': write a size, as 16k"),
        ({"evaluations": "4.5"}, "bad evaluations '4.5': write a whole number"),
        ({"seconds": "-1"}, "bad seconds '-1': write seconds"),
        ({"dtype": "fp16"}, "unknown dtype 'fp16'"),
    ],
)
def test_bad_settings(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(recipe, tmp_path / "out", "cpu", changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "not valid TOML"),
        ("title = 'x'", "has no stage"),
        ("stages = 1", "unknown table .* did you mean 'stage'"),
        ("[[stage]]\ntitle = 'x'", "stage 1 needs a title and a command"),
        ("[[stage]]\ntitle = 'x'\ncommand = 'x'\nmake = 'x'", "unknown key of stage 1 .* did you mean 'makes'"),
        ("[[stage]]\ntitle = 'x'\ncommand = 'x {who}'", "unknown setting 'who'"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare(read_recipe(str(tmp_path / "bad.toml")), tmp_path, "cpu", {})


def test_unknown_recipes_are_refused():
    with pytest.raises(UserError, match=r"unknown recipe 'quick': .*did you mean 'quickstart'"):
        read_recipe("quick")
    with pytest.raises(UserError, match=r"no such file: absent\.toml"):
        read_recipe("absent.toml")


def steps_in(folder):
    return [Step(f"{name}", (name,), folder / name) for name in ("one", "two", "three")]


def test_a_stopped_run_continues_and_finished_stages_are_skipped(recipe, tmp_path):
    out, ran = tmp_path / "out", []
    _, state = prepare(recipe, out, "cpu", {})
    assert not out.exists()

    def execute(words, stop=""):
        ran.append(words[0])
        if words[0] == stop:
            raise KeyboardInterrupt
        (out / words[0]).touch()
        return 3 if words[0] == "fails" else 0

    with pytest.raises(KeyboardInterrupt):
        run_steps(steps_in(out), state, lambda words: execute(words, "two"), print)
    assert ran == ["one", "two"]
    assert tomllib.loads((out / "training.toml").read_text()) == {"whole": True, "align_batch_tokens": 256}
    again = prepare(recipe, out, "cpu", {})[1]
    assert run_steps(steps_in(out), again, execute, print) == 0
    assert ran == ["one", "two", "two", "three"]
    assert run_steps(steps_in(out), again, execute, print) == 0
    assert len(ran) == 4

    # A stage that has lost its file is done again, and so is what reads it; a failed one ends the run.
    (out / "two").unlink()
    assert run_steps([*steps_in(out), Step("fails", ("fails",)), Step("never", ("never",))], again, execute, print) == 3
    assert ran[4:] == ["two", "three", "fails"]
    assert json.loads((out / "pipeline.json").read_text())["stages"]["nasbench fails"]["done"] is False


def test_two_processes_do_not_share_a_folder(recipe, tmp_path):
    _, state = prepare(recipe, tmp_path, "cpu", {})
    _, other = prepare(recipe, tmp_path, "cuda", {"dtype": "bf16"})

    def second(words):
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        with pytest.raises(UserError, match="another process runs a recipe"):
            run_steps(steps_in(tmp_path), other, lambda words: 0, print)
        assert {path: path.read_bytes() for path in before} == before
        return 0

    assert run_steps(steps_in(tmp_path)[:1], state, second, print) == 0


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shipped_recipes_type_legal_commands(name, device, tmp_path):
    from nasbench.cli.main import parse

    recipe = read_recipe(name)
    changes = {"dtype": "bf16"} | ({"suite": "items", "data": "text.txt"} if name.startswith("smollm2") else {})
    steps, state = prepare(recipe, tmp_path / "out", device, changes)
    for step in steps:
        parse(list(step.words))
    run_steps([], state, run, print)
    DistillConfig.read(tmp_path / "out" / "training.toml")
    assert steps[-1].words[0] == "report"


def test_dry_run_prints_and_writes_nothing(capsys, tmp_path):
    assert run(["run", "quickstart", "--dry-run", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\nnasbench ") == 7
    assert "about 180 s" in shown
    assert "MiB" in shown
    assert not (tmp_path / "out").exists()
    assert run(["run", "quickstart", "--dry-run", "--json", "--set", "scale=0.5", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "--align-tokens 8k" in found["steps"][1]["command"]
    assert run(["quickstart", "--dry-run", "--context", "64k", "--device", "cpu"]) == 2
    assert "context 65536 is not of" in capsys.readouterr().err
    assert run(["run", "quickstart", "--set", "scale"]) == 2
    assert "write NAME=VALUE" in capsys.readouterr().err


@pytest.fixture
def no_drawing(monkeypatch):
    """Figures take longer to draw than the tiny model takes to measure; tests/report looks at them."""
    monkeypatch.setattr(html, "rendered", lambda draw, name, title: Rendered(title, "", "", b""))


def test_the_quickstart_on_a_tiny_model(no_drawing, tiny_model, text_file, tmp_path, capsys):
    """Every stage for real, with the settings of the recipe made small."""
    out = tmp_path / "run"
    sizes = {"contexts": "128", "context": "128", "batches": "1", "batch": "1", "chunk": "64", "sequence": "32"}
    sizes |= {"full_attention": "1,2", "align_tokens": "1k", "supernet_tokens": "1k", "align_batch": "128"}
    sizes |= {"supernet_batch": "128", "blocks": "W8 J", "model": str(tiny_model), "dtype": "fp32"}
    sizes |= {f"{name}_seconds": "30" for name in ("profile", "align", "supernet", "beam", "optuna", "validate")}
    sizes |= {"row_seconds": "0.001", "validated": "3", "calibrate": "--in-process"}
    changes = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    assert run(["run", "quickstart", "--out", str(out), "--device", "cpu", *changes]) == 0
    shown = capsys.readouterr()
    assert "placement" in shown.out
    assert (out / "report" / "index.html").is_file()
    first = json.loads((out / "pipeline.json").read_text())
    assert all(stage["done"] for stage in first["stages"].values())
    assert run(["run", "quickstart", "--out", str(out), "--device", "cpu", *changes]) == 0
    assert capsys.readouterr().err.count("done before") == 7
    assert json.loads((out / "pipeline.json").read_text()) == first


def test_smollm2_on_a_tiny_model(no_drawing, tiny_model, text_file, tmp_path):
    """Training, three searches, finalising twice, speeds beyond the model's context, all scores, one report."""
    out, suite = tmp_path / "run", tmp_path / "suite"
    suite.mkdir()
    choices = [{"query": "the layer", "choices": ["holds", "a key"], "gold": i % 2} for i in range(6)]
    written = [{"query": "the state of each", "answers": list(string.printable.strip())} for _ in range(3)]
    for name, items in (("choices", choices), ("written", written)):
        (suite / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    values = {"model": tiny_model, "data": text_file, "suite": suite, "blocks": "W8 J"}
    values |= {"sequence": "32", "full_attention": "1,2", "finalize": "1", "random": "2", "dtype": "fp32"}
    values |= {"context": "128", "batch": "2", "long_context": "1k", "retrieval": "128", "questions": "2"}
    values |= {"tasks": "agreement@128,retrieval@96:2,retrieval@128:2", "brief_tasks": "retrieval@96:2"}
    values |= {"curve_tasks": "retrieval@96:2", "brief_items": "2", "search_tokens": "256", "test_tokens": "256"}
    values |= {f"{name}_seconds": "0.3" for name in ("align", "supernet", "search", "first_finalize")}
    values |= {"finalize_seconds": "0.6", "speed_seconds": "0.1", "measure_seconds": "120"}
    values |= {"calibrate": "", "row_seconds": "0.001"}
    changes = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    assert run(["run", "smollm2-135m", "--out", str(out), "--device", "cpu", *changes]) == 0

    table = pd.read_csv(out / "report" / "tables" / "table.csv", keep_default_na=False)
    methods = {(row.k, row.method, row.fill) for row in table.itertuples() if row.weights == "supernet"}
    for count in (1, 2):
        names = ("uniform", "random-0", "random-1", "beam", "kl-greedy", "greedy-swap, kl+retrieval-kl@128:2")
        assert methods >= {(count, name, "best") for name in names}
    assert set(table["weights"]) == {"teacher", "supernet", "final", "final:average"}
    teacher = table[table["method"] == "teacher"].iloc[0]
    assert float(teacher["kl"]) == pytest.approx(0, abs=1e-5)
    assert float(teacher["suite_kept"]) == 1
    final = table[table["weights"] == "final"].iloc[0]
    assert final["suite_items"] == 9
    assert float(teacher["decode_tok_s_1k"]) > 0
    curve = pd.read_csv(out / "report" / "tables" / "curve.csv")
    tokens = curve[curve["weights"] == "final"]["tokens"].tolist()
    assert len(tokens) == 3
    assert tokens == sorted(tokens)
    assert set(pd.read_csv(out / "report" / "tables" / "comparison.csv")["against"]) == {"uniform", "median random"}
    assert "| the model itself |" in (out / "report" / "summary.md").read_text()
    assert "final:average" in (out / "report" / "tables" / "table.csv").read_text()
