"""The comparison of placements: its tables are those of the scores, item by item."""

import math

import numpy as np
import pytest
from search.synthetic import SyntheticObjective

from nasbench.core.files import write_json
from nasbench.core.tables import write_table
from nasbench.evaluation.scores import ScoreKey, Scores, ScoreStore
from nasbench.model.shapes import ModelSpec
from nasbench.report.comparison import MEDIAN, Comparison, tables
from nasbench.report.comparison_figures import comparison_drawings
from nasbench.report.sections import best_searched, markdown, name_of, sections
from nasbench.runs import Run, RunSpec
from nasbench.search.compared import Benchmark, Compared, benchmarks_path, compared
from nasbench.search.session import Options, Session, run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.validation import ValidationRow
from nasbench.spaces.placement import format_placement, parse_placement
from nasbench.supernet.finalize import CONFIG, final_folder

SHAPE = ModelSpec("tiny", "llama", 6, 32, 48, 4, 2, 8, 256, 512, 10_000.0, 1e-5)
ITEMS, FEW = 40, 10


class Objective(SyntheticObjective):
    def speed(self, placement):
        from nasbench.search.objective import Speed

        step_ms = 1.0 + sum({"A": 1.0, "W8": 0.5, "J": 0.3}[name] for name in placement)
        return Speed(4 / step_ms * 1e3, 9000.0, step_ms, 1000 * placement.count("A"), "measured")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A searched run, every placement scored on text, and the chosen ones on everything."""
    made = Run.create(tmp_path_factory.mktemp("compared") / "run", RunSpec("tiny", ("A", "W8", "J"), 6))
    objective = Objective(6, ("A", "W8", "J"))
    objective.store = ScoreStore(made.scores)
    for strategy in ("beam", "kl-greedy"):
        assert strategy in STRATEGIES
        run_search(Session(made.path, objective, Options((1, 2, 3), evaluations=30, random=3)), strategy)
    write_table(benchmarks_path(made), [Benchmark("choices", ITEMS, 0.25)], Benchmark)
    rows = compared(made)
    final = next(row for row in rows if row.method == "beam" and row.k == 2).placement
    for variant in ("", "average"):
        folder = final_folder(made, final, variant)
        write_json(folder / CONFIG, {"model": "tiny", "supernet": "v1", "placement": format_placement(final)})
        write_json(folder / "history.json", {f"half{variant}": 50, f"whole{variant}": 100})
    for row in compared(made):
        put(objective.store, row, "v1" if row.weights in ("supernet", "teacher") else "whole" + row.weights[6:])
    put(objective.store, Compared(2, "beam", final), "half")
    speeds = [
        ValidationRow(
            placement=row.text, context=context, batch=4, dtype="bf16", predicted_tok_s=math.nan, error=math.nan,
            measured_tok_s=1000.0 / (1 + row.k), device="test-device", measured_utc="2026-01-01T00:00:00Z",
        )
        for row in rows if row.chosen for context in (256, 1024)
    ]  # fmt: skip
    write_table(made.validation, speeds, ValidationRow)
    return made


def put(store, row, version):
    """Scores that fall with what is replaced; random placements get a few items of the benchmark."""
    rng = np.random.default_rng(7)
    loss = 3 + rng.normal(0, 0.1, 32)
    gap = sum(name != "A" for name in row.placement) / 20 + (len(row.text) % 7) / 1000
    right = (rng.random(ITEMS) > 0.3 + gap).astype(float)
    values = {"loss": (loss + gap, False), "kl": (np.full(32, gap) + rng.normal(0, 1e-4, 32), False)}
    values |= {f"retrieval@{n}:20": ((rng.random(20) > gap).astype(float), True) for n in (64, 128)}
    values |= {"agreement@128": (1 - gap + 0 * loss, True)}
    if row.chosen:
        values |= dict.fromkeys(("suite:choices", "suite:choices.plain"), (right, True))
    else:
        values |= {f"suite@{FEW}:choices": (right[:: ITEMS // FEW], True)}
    store.put(
        {
            ScoreKey(version, row.text, task, "test/32x32/abcd", "bfloat16"): Scores.of(
                samples, "accuracy" if up else "nats", up
            )
            for task, (samples, up) in values.items()
        }
    )


@pytest.fixture(scope="module")
def found(run):
    return Comparison(run, SHAPE)


def test_what_is_compared(found):
    methods = {(row.k, row.method, row.fill, row.weights) for row in found.rows}
    names = ("uniform", "random-0", "random-1", "random-2", "beam", "kl-greedy")
    assert methods >= {(k, name, "best", "supernet") for k in (1, 2, 3) for name in names}
    assert (6, "teacher", "best", "teacher") in methods
    # Without full attention nothing is placed: the searches' empty set is the even one.
    assert {method for k, method, _, _ in methods if k == 0} == {"uniform"}
    assert [row.k for row in found.rows] == sorted((row.k for row in found.rows), reverse=True)
    assert {row.weights for row in found.rows} == {"teacher", "supernet", "final", "final:average"}
    assert found.measured


def test_a_row_of_the_table_is_what_the_scores_say(found):
    table = found.table()
    teacher, beam = (table[table["method"] == name].iloc[0] for name in ("teacher", "beam"))
    assert teacher["loss_above_teacher"] == 0
    assert teacher["suite_kept"] == 1
    row = next(row for row in found.rows if row.method == "beam")
    ours, theirs = (found.scores(each, "loss").samples for each in (row, found.teacher))
    assert beam["loss_above_teacher"] == pytest.approx((ours - theirs).mean())
    assert beam["loss_above_teacher_se"] == pytest.approx((ours - theirs).std(ddof=1) / math.sqrt(32))
    right, whole = (found.scores(each, "suite:choices").value - 0.25 for each in (row, found.teacher))
    assert beam["suite_kept"] == pytest.approx(right / whole)
    assert beam["suite_items"] == ITEMS
    assert beam["decode_tok_s_1k"] == pytest.approx(1000 / (1 + beam["k"]))
    drawn = table[table["method"] == "random-0"].iloc[0]
    assert drawn["suite_items"] == FEW
    assert drawn["retrieval_64_n20"] >= 0


def test_gaps_are_over_common_items(found):
    gaps = found.gaps().set_index(["k", "searched", "against"])
    even, drawn = gaps.loc[2, "beam", "uniform"], gaps.loc[2, "beam", MEDIAN]
    assert even["suite_items"] == ITEMS
    assert drawn["suite_items"] == FEW
    rows = {row.method: row for row in found.rows if row.k == 2 and row.fill == "best" and row.weights == "supernet"}
    ours, theirs = (found.scores(rows[name], "kl").samples for name in ("beam", "uniform"))
    assert even["kl"] == pytest.approx((ours - theirs).mean())
    assert even["kl_low"] <= even["kl"] <= even["kl_high"]
    middle = sorted((found.scores(rows[f"random-{i}"], "kl").value, i) for i in range(3))[1][1]
    assert found.median_random(2) == rows[f"random-{middle}"]


def test_ranks_take_placements_with_all_items_and_the_supernets_weights(found):
    ranks = found.ranks().set_index(["score", "pairs", "measure"])
    known = {row.text for row in found.rows if row.weights == "supernet" and row.fill == "best"}
    asked = {row.text for row in found.rows if row.weights == "supernet" and row.chosen}
    assert ranks.loc["kl", "all", "retrieval_64_n20"]["placements"] == len(known)
    assert ranks.loc["kl", "all", "suite"]["placements"] == len(asked)
    assert ranks.loc["kl", "all", "agreement_128"]["tau"] == pytest.approx(1, abs=0.1)


def test_the_curve_has_the_weights_before_and_every_budget(found):
    curve = found.curve()
    assert curve[curve["weights"] == "final"]["tokens"].tolist() == [0, 50, 100]
    assert curve[curve["weights"] == "final:average"]["tokens"].tolist() == [0, 100]
    assert curve["kl"].notna().all()


def test_sections_and_figures(found):
    text = markdown(sections(found))
    assert text.count("\n## ") + text.startswith("## ") == 5
    for name in ("the model itself", "evenly spread", "median random", "beam", "finalised", "finalised, average"):
        assert f"| {name} |" in text, name
    assert "| K | search | against | KL | loss | retrieval 128 | benchmarks |" in text
    assert f", {FEW} items" in text
    assert "**" in text
    assert all(text.count(f"\n| {layers} | ") == 1 for layers in ("6A",))
    drawn = comparison_drawings(found)
    assert set(drawn) >= {"kl", "loss-above-teacher", "retrieval", "kl-against-speed-1k", "finalising", "suite-kept"}
    for _, draw in drawn.values():
        assert draw(True).figure.axes
    shown = [name_of(found, row) for row in found.rows if row.method.startswith("random-")]
    assert sum(bool(name) for name in shown) == 3
    assert set(tables(found)) == {"table", "comparison", "ranks", "curve", "suite"}


def test_the_best_of_each_count_stands_beside_the_even_spread(found):
    pairs = best_searched(found)
    assert [row.k for row, _ in pairs] == [6, 3, 2, 1, 0]
    assert [even and even.method for _, even in pairs] == [None, *["uniform"] * 4]
    for row, even in pairs[1:-1]:
        assert row.method in ("beam", "kl-greedy")
        assert even.k == row.k


def test_a_run_without_searches_compares_nothing(tmp_path):
    bare = Comparison(Run.create(tmp_path / "run", RunSpec("tiny", ("A", "J"), 6)), SHAPE)
    assert bare.rows == []
    assert not bare.measured
    assert sections(bare) == []
    assert comparison_drawings(bare) == {}


def test_a_placement_file_knows_its_layers():
    assert Compared(1, "file", parse_placement("A 2J")).text == "A 2J"
