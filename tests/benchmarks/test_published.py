"""benchmarks/published.py: what is measured once, and the table that comes of it."""

import pytest

import benchmarks.published as bench
from nasbench.core.by_device import ByDevice
from nasbench.core.tables import read_table


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("nasbench.runtime.roofline.BUFFER_BYTES", ByDevice(cpu=1 << 20))
    monkeypatch.setattr("nasbench.runtime.roofline.MATRIX", ByDevice(cpu=64))
    monkeypatch.setattr("nasbench.runtime.throughput.MOST_SEQUENCES", 3)


def test_a_model_at_both_batches_once(tiny_model, tmp_path, capsys):
    line = [str(tiny_model), "--out", str(tmp_path), "--context", "64", "--batch", "2", "--device", "cpu"]
    line += ["--seconds", "0.01"]
    assert bench.main(line) == 0
    rows = read_table(tmp_path / "efficiency.csv", bench.Row)
    assert [(row.at, row.batch) for row in rows] == [("common", 2), ("largest", 3)]
    assert all(row.decode_tok_s == pytest.approx(row.batch / row.step_ms * 1e3, rel=1e-2) for row in rows)
    before = (tmp_path / "efficiency.csv").read_bytes()
    assert bench.main(line) == 0
    assert (tmp_path / "efficiency.csv").read_bytes() == before
    assert bench.main(["nonsense", *line[1:]]) == 2


def test_the_papers_figures_stand_beside():
    sizes = dict.fromkeys(("step_p20_ms", "step_p80_ms", "floor_ms"), 8.0) | {"step_ms": 10.0, "peak_gib": 30.0}
    told = dict.fromkeys(("device", "dtype", "torch", "driver", "nasbench", "measured_utc"), "x")
    row = bench.Row("jet-nemotron-2b", 65536, "largest", 128, 1.97, 157.25, decode_tok_s=12800.0, **sizes, **told)
    lines = bench.table([row])
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    figures = ["1.97", "2.0", "157.2", "154", "-", "-", "-", "128", "12,800", "0.80", "2,885"]
    assert cells == ["jet-nemotron-2b", "64k", *("" if figure == "-" else figure for figure in figures)]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
