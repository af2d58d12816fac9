"""benchmarks/harness.py: a whole run on a tiny shape, and the share of equal text."""

import pytest

import benchmarks.harness as bench
from nasbench.core.tables import read_table
from nasbench.model.shapes import DEFAULT_MODEL, ModelSpec

TINY = ModelSpec("test", "llama", 2, 32, 48, 4, 2, 8, 300, 512, 1e4, 1e-5, tie_embeddings=True)


def test_every_kind_of_request_is_a_row(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(bench, "MODELS", {DEFAULT_MODEL: TINY})
    monkeypatch.setattr(bench, "SETS", {"endings": (3, 4, "", 0), "letters": (3, 4, "ABCD", 20)})
    path = tmp_path / "harness.csv"
    options = ["--dtypes", "fp32", "--batch", "4", "--repeats", "1", "--shrink", "1", "--out", str(path)]
    assert bench.main([*options, "--new-tokens", "16"]) == 0
    rows = read_table(path, bench.Row)
    assert [(row.requests, row.count) for row in rows] == [("endings", 12), ("letters", 12), (bench.TEXTS, 4)]
    assert all(row.largest_difference_nats < 1e-3 for row in rows[:2])
    assert all(row.equal > 0.9 for row in rows)
    assert all(row.ratio == pytest.approx(row.hf_s / row.nasbench_s) for row in rows)


def test_texts_are_equal_up_to_the_first_difference():
    assert bench.equal_share(["abcd", "ab"], ["abxd", "abcd"]) == pytest.approx(4 / 6)
    assert bench.equal_share([""], ["a"]) == 0
