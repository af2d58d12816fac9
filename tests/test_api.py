"""`import nasbench as nb`: light to import, whole when used; the notebooks under docs/ run."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from report.synthetic_run import make_run
from search.test_search_command import prepared

import nasbench as nb
from nasbench.core.errors import UserError
from nasbench.model import MIXERS
from nasbench.runs import Run, RunSpec

__all__ = ["prepared"]
NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made"))


def test_importing_costs_nothing():
    code = "import sys, nasbench as nb; dir(nb); print([m for m in ('torch', 'pandas', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_package_is_also_its_function():
    import nasbench.cost.model
    from nasbench.cost import CostModel

    assert nb.cost.model is nasbench.cost.model
    assert nb.cost.CostModel is CostModel
    found = nb.cost("28A", "qwen3-1.7b", "64k", 2, profile="nvidia-rtx-3090")
    assert found.cache_bytes == 28 * 2 * 65536 * 2 * 8 * 128 * 2
    assert nb.devices().loc["nvidia-h200", "bandwidth_gb_s"] == 4800
    assert "nvidia-h200" in set(nb.read_profiles("nvidia-h200")["device"])
    assert nb.models().loc["qwen3-1.7b", "num_layers"] == 28
    assert {"cost", "search", "trials", "plot"} <= set(dir(nb))
    with pytest.raises(AttributeError):
        nb.nothing  # noqa: B018


def test_tables_of_a_run(made):
    run, db = made
    trials, front = nb.trials(run.path), nb.front(str(run.path))
    assert set(front["placement"]) <= set(trials["placement"])
    assert len(nb.scores(run.path)) >= 2 * trials["placement"].nunique()
    assert (nb.validation(run.path)["measured_tok_s"] > 0).all()
    told = nb.recommend(run.path, db=db)
    assert told.point.row.placement in set(front["placement"])
    assert nb.recommend(run.path, 10.0, db=db).point.row.decode_tok_s == front["decode_tok_s"].max()
    assert all(isinstance(axes, matplotlib.axes.Axes) for axes in nb.plot.training(run.path, db=db))


def test_wrong_input_is_refused(made, tmp_path):
    run, _ = made
    with pytest.raises(UserError, match=r"unknown search option 'evaluation': .*did you mean 'evaluations'"):
        nb.search(run.path, evaluation=3)
    with pytest.raises(UserError, match="is not a run folder"):
        nb.trials("nowhere")
    with pytest.raises(UserError, match="has no data for the figure"):
        nb.plot.roofline(Run.create(tmp_path / "bare", RunSpec("default", ("A", "J"), 30)).path)


def cells(name):
    found = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def execute(name):
    """The variables after all cells."""
    known = {"__name__": "notebook"}
    for number, cell in enumerate(cells(name)):
        exec(compile(cell, f"{name} cell {number}", "exec"), known)
    return known


def test_notebook_profile_and_cost():
    known = execute("profile-and-cost.ipynb")
    assert known["hybrid"].decode_tok_s > known["full"].decode_tok_s
    assert isinstance(known["times"], pd.DataFrame)
    assert len(known["times"]) > 1


def test_notebook_search_on_a_run(prepared, monkeypatch):
    run, db = prepared
    nb.search(run.path, full_attention=(1, 2), context=128, batch=2, profile="test-device", dtype="bf16", db=db,
              search_tokens=256, test_tokens=256, evaluations=8)  # fmt: skip
    monkeypatch.setenv("NASBENCH_RUN", str(run.path))
    (run.path / "profiles").mkdir()
    for path in db.glob("*.csv"):
        (run.path / "profiles" / path.name).write_text(path.read_text())
    known = execute("search-on-a-run.ipynb")
    assert [pair.k for pair in known["outcome"].comparisons] == [1, 2]
    assert known["told"].point.hybrid


def test_notebook_a_block_of_your_own(monkeypatch):
    monkeypatch.setattr(MIXERS, "_items", dict(MIXERS._items))
    known = execute("a-block-of-your-own.ipynb")
    assert known["drift"] < 1e-5
    assert float((known["whole"] - known["steps"]).abs().max()) < 1e-4


def test_notebooks_hold_no_outputs():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), f"clear the outputs of {path.name}"
