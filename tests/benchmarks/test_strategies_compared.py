"""benchmarks/strategies.py on a tiny run: strategies in both tables, and a failing one does not stop the others."""

from pathlib import Path

import pytest
from made_up_rows import profile_rows
from supernet_tiny import make_run, one_thread, save_supernet, text_file, tiny_model

import benchmarks.strategies as bench
from benchmarks.strategies_page import Best, Summary
from nasbench.checkpoints.load import load_model
from nasbench.core.tables import read_table
from nasbench.search.strategies import STRATEGIES
from nasbench.store import Database
from nasbench.supernet.supernet import Supernet

__all__ = ["make_run", "one_thread", "text_file", "tiny_model"]


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def test_strategies_are_compared(make_run, tmp_path, capsys):
    def broken(search):
        raise RuntimeError("it broke")

    made, db, out = make_run(), tmp_path / "db", tmp_path / "out"
    save_supernet(Supernet(load_model(made.spec.model), made.spec.space), made.supernet)
    db.mkdir()
    Database(db / "test-device.csv").merge(profile_rows())
    names = ["uniform", "beam", "exact", "gates", "optuna"]
    STRATEGIES.register("broken", broken)
    try:
        arguments = [str(made.path), "--out", str(out), "--db", str(db), "--profile", "test-device", "--seeds", "2"]
        sizes = ["--evaluations", "8", "--search-tokens", "256", "--test-tokens", "512", "--full-attention", "1,2"]
        assert bench.main([*arguments, *sizes, "--strategies", ",".join([*names, "broken"])]) == 0
    finally:
        del STRATEGIES._items["broken"]
    rows = {(row.equal, row.strategy): row for row in read_table(out / "summary.csv", Summary)}
    assert set(rows) == {(equal, name) for equal in ("evaluations", "seconds") for name in names} | {
        ("evaluations", "broken")
    }
    assert rows["evaluations", "broken"].note == "RuntimeError: it broke"
    for (equal, name), row in rows.items():
        if name != "broken":
            assert not row.note
            assert row.low <= row.hypervolume <= row.high
            assert row.seeds == (1 if name in bench.SAME_FOR_EVERY_SEED else 2)
            assert row.evaluations <= 8 or equal == "seconds"
            assert row.seconds > 0
    assert rows["evaluations", "uniform"].above_even == 0
    best = read_table(out / "scores.csv", Best)
    assert {(row.strategy, row.k) for row in best} >= {("beam", 1), ("beam", 2), ("optuna", 1)}
    page = (out / "README.md").read_text()
    assert "## At equal evaluations" in page
    assert (out / "hypervolume.png").is_file()
    assert bench.main(["--draw", str(out)]) == 0
    assert (out / "README.md").read_text() == page
    assert not list(Path(made.path).glob("trials.csv"))
    assert "equal seconds" in capsys.readouterr().out
