"""The whole recipe on a tiny model: every stage, its tables, and that it goes on where it stopped."""

import inspect
import json
import string
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from matplotlib.figure import Figure

from nasbench.cli import reproduce_command
from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size
from nasbench.evaluation.suite import Suite
from nasbench.reproduce import measure, page, stages, summary
from nasbench.reproduce.items import Items, Subject
from nasbench.reproduce.measure import subject_of
from nasbench.reproduce.page import read
from nasbench.reproduce.recipe import Candidate, Plan, Recipe
from nasbench.reproduce.table import Facts, comparison_rows
from nasbench.spaces.placement import parse_placement
from nasbench.supernet.settings import DistillConfig

app = typer.Typer()
app.command("reproduce")(reproduce_command.command)


def nas(*args):
    app([str(arg) for arg in args], standalone_mode=False)


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path):
    suite = tmp_path / "suite"
    suite.mkdir()
    choices = [{"query": "the layer", "choices": ["holds", "a key"], "gold": i % 2} for i in range(6)]
    written = [{"query": "the state of each", "answers": list(string.printable.strip())} for _ in range(3)]
    for name, items in (("choices", choices), ("written", written)):
        (suite / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    settings = tmp_path / "settings.toml"
    settings.write_text(
        "ridge_tokens = 512\nalign_batch_tokens = 128\nsupernet_batch_tokens = 128\nlog_every = 1\n"
        "frozen = []\nsolved = []\ndocuments = false\nwhole = true\nrepeat_share = 0.5\n"
    )
    return (
        *("--out", tmp_path / "run", "--model", tiny_model, "--names", "W8,J", "--data", text_file, "--suite", suite),
        *("--sequence", "32", "-k", "0,1,2,4", "--finalize", "1", "--seeds", "2", "--config", settings),
        *("--align-seconds", "0.5", "--supernet-seconds", "0.5", "--search-seconds", "0.5"),
        *("--finalize-seconds", "0.5"),
        *("--speed-seconds", "0.1", "--contexts", "128,1k", "--batches", "2,1", "--search-tokens", "256"),
        *("--test-tokens", "256", "--quick-items", "2", "--retrieval", "96,128", "--quick-retrieval", "96"),
        *("--retrieval-items", "2", "--device", "cpu", "--dtype", "fp32"),
    )


def test_everything_is_measured_and_a_stopped_run_goes_on(arguments, tmp_path, monkeypatch):
    run, report = tmp_path / "run", tmp_path / "run" / "report"
    monkeypatch.setattr(stages, "SELF_TOKENS", {"cpu": 4096})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "finalise", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            nas(*arguments)
    plan = json.loads((run / "plan.json").read_text())
    assert plan["align"]["tokens"] > 0
    assert plan["supernet"]["tokens"] > 0

    nas(*arguments, "--remedies", "mixers,long,self,plain,average")
    after = json.loads((run / "plan.json").read_text())
    assert after["supernet"] == plan["supernet"]
    assert after["command"] in (report / "summary.md").read_text()
    rows = read(report / "table.csv")
    methods = {(row["k"], row["method"], row["fill"]) for row in rows if row["weights"] == "supernet"}
    assert methods >= {("0", "uniform", "J"), ("0", "uniform", "best")}
    for count in ("1", "2"):
        names = ("uniform", "random-0", "random-1", "beam", "kl-greedy", "recall")
        assert methods >= {(count, name, "best") for name in names}
    tried = {"final:mixers", "final:long", "final:self", "final:plain", "final:average"}
    assert {row["weights"] for row in rows} == {"teacher", "supernet", "final", *tried}
    teacher = next(row for row in rows if row["method"] == "teacher")
    assert float(teacher["kl"]) == pytest.approx(0, abs=1e-5)
    assert float(teacher["suite_kept"]) == 1
    assert float(teacher["agreement_128"]) == 1
    assert all(float(row["kl"]) > 0 for row in rows if row is not teacher)
    assert all(row["suite_kept"] and row["retrieval_96_n2"] for row in rows)
    final = next(row for row in rows if row["weights"] == "final")
    assert final["retrieval_128_n2"]
    assert final["suite_items"] == "9"
    assert float(final["decode_tok_s_1k"]) > 0
    assert {row["speed_source_128"] for row in rows} <= {"measured", "estimated"}
    curve = [row for row in read(report / "curve.csv") if row["weights"] == "final"]
    tokens = [int(row["tokens"]) for row in curve]
    assert tokens[0] == 0
    assert tokens == sorted(tokens)
    assert all(0 <= float(row["retrieval"]) <= 1 for row in curve)
    assert float(curve[-1]["kl"]) == pytest.approx(float(final["kl"]), rel=1e-3)
    assert {row["against"] for row in read(report / "comparison.csv")} == {"uniform", "median random"}
    assert (report / "ranks.csv").is_file()
    assert "and were asked every item of the benchmarks." in (report / "summary.md").read_text()
    assert "## What the scores of a search say of the rest" in (report / "summary.md").read_text()
    assert (report / "kl.png").is_file()
    summary = (report / "summary.md").read_text()
    assert all(f"| {name} |" in summary for name in ("the model itself", "median random", "beam", "finalised, long"))
    assert "| K | search | against | KL | loss | retrieval 128 | benchmarks |" in summary
    assert "| layers | tokens/s at 128 | cache, GiB, at 128 | tokens/s at 1k | cache, GiB, at 1k |" in summary
    assert all(summary.count(f"\n| {layers} | ") == 1 for layers in ("4A", "2A 2J", "4J"))
    html = (report / "index.html").read_text()
    assert "Every placement" in html
    assert all(f">{name}<" in html for name in ("the model itself", "median random", "finalised, long"))
    assert (report / "curve-retrieval.png").stat().st_size > 1000

    # Seen once; they take longer to draw than the tiny model takes to measure.
    monkeypatch.setattr(page, "figures", lambda _: [])
    lines = (run / "items.jsonl").read_text()
    (run / "items.jsonl").write_text(lines + '{"placement": "4')
    monkeypatch.setattr(stages, "_largest_step", lambda *_: pytest.fail("timed again"))
    monkeypatch.setattr(stages, "finalize", lambda *_, **__: pytest.fail("finalised again"))
    again = [*arguments[: arguments.index("--speed-seconds") + 1], "0", *arguments[arguments.index("0.1") + 1 :]]
    nas(*again, "--remedies", "mixers,long,self,plain,average")
    assert (run / "items.jsonl").read_text() == lines + '{"placement": "4'
    assert read(report / "table.csv") == rows
    for path in report.iterdir():
        path.unlink()
    nas(*arguments, "--report-only")
    assert read(report / "table.csv") == rows

    (report / "index.html").unlink()
    monkeypatch.setattr(measure, "measure_all", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        nas(*again, "--remedies", "mixers,long,self,plain,average")
    assert (report / "index.html").is_file()


@pytest.mark.parametrize(
    ("device", "replayed", "free", "graphs"),
    [
        ("cuda", 200.0, 4 << 30, True),
        ("cuda", 101.0, 4 << 30, False),
        ("cuda", None, 4 << 30, False),
        ("cuda", 200.0, (4 << 30) - 1, False),
        ("cpu", 200.0, 4 << 30, False),
    ],
)
def test_graphs_replay_sub_networks_where_they_fit_and_are_faster(monkeypatch, device, replayed, free, graphs):
    asked = []

    def timed(_, stage, changes):
        asked.append(changes)
        if changes[f"{stage}_batch_tokens"] > 4096:
            return None
        tok_s = replayed if changes.get("graphs") else 100.0
        graphs = bool(changes.get("graphs"))
        return tok_s and {"batch_tokens": 4096, "tok_s": tok_s, "graphs": graphs, "peak_bytes": 1 << 30}

    monkeypatch.setattr(stages, "_timed_step", timed)
    recipe = Recipe(training=DistillConfig(align_batch_tokens=8192, supernet_batch_tokens=8192))
    monkeypatch.setattr(stages, "free_bytes", lambda _: free)
    run = SimpleNamespace(spec=SimpleNamespace(names=("A", "W8", "J")))
    bench = SimpleNamespace(recipe=recipe, device=device, log=lambda line: None, run=run)
    assert stages._largest_step(bench, "supernet")["graphs"] is graphs
    assert any(changes.get("graphs") for changes in asked) is (device == "cuda" and free >= 4 << 30)
    assert stages._largest_step(bench, "align")["tok_s"] == 100


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("CUDA error: out of memory")])
def test_a_step_that_does_not_fit_is_none_and_any_other_error_passes(monkeypatch, error):
    bench = SimpleNamespace(
        recipe=Recipe(), device="cpu", run=None, loaded=None, corpus=None, forget=lambda: forgotten.append(True)
    )
    forgotten = []

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(stages, "Distiller", fails)
    assert stages._timed_step(bench, "align", {}) is None
    assert forgotten
    error = RuntimeError("shapes do not fit each other")
    with pytest.raises(RuntimeError, match="shapes"):
        stages._timed_step(bench, "align", {})


def test_the_command_asks_for_what_the_recipe_says():
    """Both tell their defaults, the command without importing torch."""
    told = {name: option.default for name, option in inspect.signature(reproduce_command.command).parameters.items()}
    recipe = Recipe()
    for name, value in vars(recipe).items():
        if name.endswith(("_seconds", "_items")) or name in ("seeds", "seed", "finalize_lr", "choose"):
            assert told[name] == value, name
    for name in ("sequence", "search_tokens", "test_tokens"):
        assert parse_size(told[name]) == getattr(recipe, name), name
    for name in ("contexts", "batches", "retrieval", "quick_retrieval"):
        assert reproduce_command._sizes(told[name]) == getattr(recipe, name), name
    assert tuple(map(int, told["full_attention"].split(","))) == recipe.counts
    assert tuple(map(int, told["finalize"].split(","))) == recipe.finalized
    assert tuple(told["remedies"].split(",")) == recipe.remedies


def test_a_finalising_that_was_stopped_is_not_thought_faster(monkeypatch, tmp_path):
    """The first quarter takes 100 s, of which 60 before it is stopped: 300 s are left for the rest, at that speed."""
    clock, asked = [0.0], []

    def finalised(bench, candidate, config, tokens, *rest):
        asked.append(tokens)
        clock[0] += {1: 60.0, 2: 40.0}.get(len(asked), 300.0)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return tmp_path

    monkeypatch.setattr(stages, "_finalise", finalised)
    monkeypatch.setattr(stages, "_supernet_version", lambda bench: "v")
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    plan = Plan(tmp_path / "plan.json")
    plan["supernet"] = {"batch_tokens": 1000, "tok_s": 500.0}
    plan["finalize-1-placement"] = {"placement": "A J", "method": "beam"}
    bench = SimpleNamespace(
        recipe=Recipe(finalize_seconds=400.0),
        plan=plan,
        log=lambda line: None,
        shape=SimpleNamespace(parse=parse_placement),
    )
    with pytest.raises(KeyboardInterrupt):
        stages.finalise(bench, 1, lambda *_: None)
    stages.finalise(bench, 1, lambda *_: None)
    assert asked == [50_000, 50_000, 200_000]
    assert plan["finalize-1-spent"] == 400


def test_few_items_are_those_among_all(tmp_path):
    """`choices@3` of who was asked all seven, and which of the tasks are left then."""
    items, subject = Items(tmp_path / "items.jsonl"), Subject("2A", "supernet")
    items.add(subject, "v", {"choices": np.arange(7.0)})
    assert items.some(subject, "choices", 3).tolist() == [0, 2, 4]
    assert items.some(subject, "written", 3) is None
    items.add(subject, "v", {"written@3": np.ones(3)})
    assert items.some(subject, "written", 3).tolist() == [1, 1, 1]
    # Of weights that were trained on since, what was asked last counts, whichever it is.
    newer = Items(tmp_path / "newer.jsonl")
    for name, value in (("choices@3", 0.0), ("choices", 1.0), ("choices@3", 2.0)):
        time.sleep(0.002)
        newer.add(subject, str(value), {name: np.full(3 if "@" in name else 7, value)})
        assert newer.some(subject, "choices", 3).tolist() == [value] * 3
    measurer = measure.Measurer(None, items)
    measurer.version = lambda candidate: "v"
    tasks = [Suite(tmp_path / f"{name}.jsonl", limit) for name in ("choices", "written") for limit in (3, 0)]
    left = measurer.missing(Candidate(2, "beam", ("A", "A")), tasks)
    assert [(task.path.stem, task.limit) for task in left] == [("written", 0)]
    measurer.version = lambda candidate: "trained on"
    assert measurer.missing(Candidate(2, "beam", ("A", "A")), tasks) == tasks


def test_searched_and_random_placements_are_compared_item_by_item(tmp_path):
    """Over all items of both, else over the few: the intervals are those of differences."""
    plan = Plan(tmp_path / "plan.json")
    teacher = Candidate(2, "teacher", ("A", "A"), weights="teacher")
    rows = [Candidate(1, name, place) for name, place in (("beam", ("A", "J")), ("uniform", ("J", "A")))]
    rows.append(Candidate(1, "random-0", ("J", "W8")))
    plan.add_candidates([teacher, *rows])
    items = Items(tmp_path / "items.jsonl")
    theirs, ours = np.array([0.0, 1, 0, 1, 0, 0, 1, 0]), np.array([1.0, 1, 0, 1, 1, 0, 1, 1])
    for row, values in ((teacher, theirs), (rows[0], ours), (rows[1], theirs)):
        items.add(subject_of(row), "v", {"choices": values})
    items.add(subject_of(rows[2]), "v", {"choices@4": theirs[::2], "kl": np.ones(3)})
    for row, answers in zip(rows, ([1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]), strict=True):
        items.add(subject_of(row), "v", {"retrieval@96:4": np.array(answers)})
    items.add(subject_of(teacher), "v", {"retrieval@96:4": np.ones(4)})
    facts = Facts(plan, items, None, {"choices": 0.5}, 4)
    even, drawn = comparison_rows(facts)
    gaps = ours - theirs
    half = 1.96 * gaps.std(ddof=1) / 8**0.5
    assert (even["suite"], even["suite_items"]) == (gaps.mean(), 8)
    assert even["suite_low"] == pytest.approx(gaps.mean() - half)
    assert (drawn["suite"], drawn["suite_items"]) == (gaps[::2].mean(), 4)
    assert (even["retrieval_96_n4"], drawn["retrieval_96_n4"]) == (0.5, 0.75)
    head, table = summary._comparison(facts)
    assert head == ["K", "search", "against", "KL", "loss", "retrieval 96", "benchmarks"]
    assert [line[2] for line in table] == ["evenly spread", "median random"]
    assert table[1][-1].endswith(", 4 items")
    assert not table[0][-1].endswith("items")
    assert table[1][5].startswith("**+75.0 (+26.0 to")


@pytest.mark.parametrize(("asked", "shown"), [("9", 3), ("4", 2)])
def test_placements_that_were_asked_few_items_are_not_drawn_beside_others(asked, shown):
    row = {"fill": "best", "weights": "supernet", "suite_kept": "0.9", "suite_kept_se": "0.1", "suite_items": "9"}
    rows = [{**row, "k": str(k), "method": "random-0", "suite_items": items} for k, items in enumerate("99" + asked)]
    axes = Figure().subplots()
    page.by_count(axes, rows, "suite_kept")
    assert [len(dots.get_offsets()) for dots in axes.collections] == [shown]


def test_what_was_chosen_is_asked_first():
    recipe = Recipe(counts=(0, 1, 2), finalized=(2,))
    final = Candidate(2, "beam", ("A", "A", "J"), weights="final")
    teacher = Candidate(3, "teacher", ("A", "A", "A"), weights="teacher")
    beams = [Candidate(1, "beam", ("A", "J", "J")), Candidate(2, "beam", ("A", "A", "J"))]
    others = [Candidate(1, "random-0", ("J", "A", "J")), Candidate(1, "uniform", ("J", "A", "J"), "J")]
    bench = SimpleNamespace(recipe=recipe, plan=SimpleNamespace(candidates=[*others, *beams, final, teacher]))
    asked = list(measure.queue(bench))
    chosen = [final, teacher, *reversed(beams)]
    briefly = [(row, False) for row in others]
    assert asked == [*((row, True) for row in chosen), *briefly, *((row, True) for row in others)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--finalize", "3"), "bad --finalize 3"),
        (("-k", "9"), "choose 0 to 4"),
        (("--choose", "klm"), "did you mean 'kl'"),
        (("--remedies", "fats"), "did you mean 'fast'"),
        (("--suite", "absent"), "no such folder"),
        (("--contexts", "8k"), "1 contexts and 2 batches"),
        (("--align-seconds", "-1"), "bad align-seconds"),
        (("--sequence", "4k"), "beyond the context"),
        (("--measure-devices", "cpu,cup"), "did you mean 'cpu'"),
        (("--report-only",), "nothing to report"),
    ],
)
def test_bad_input(arguments, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        nas(*arguments, *changes)
    assert "\n" not in str(caught.value)
