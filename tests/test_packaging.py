"""Wheel, editable install and bare checkout all find kernels and shipped profiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COST = [
    "-m",
    "nasbench",
    "cost",
    "14J A 4J A 2W 6J",
    "--model",
    "jet-nemotron-2b",
    "--context",
    "64k",
    "--batch",
    "1",
    "--json",
]
WHERE = (
    "import json, nasbench, nasbench.core.sizes, nasbench.model.mixers.gated_delta.jet_block, nasbench_kernels;"
    "print(json.dumps([nasbench.__file__, list(nasbench_kernels.__path__)[0], str(nasbench.core.sizes.profiles_dir()),"
    "nasbench.core.sizes.profiles_dir().is_dir()]))"
)


def run_python(args: list[str], cwd: Path, path: str | None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = path
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_python(["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)], ROOT, None)
    (wheel,) = (folder / "dist").glob("nasbench-*.whl")
    site = folder / "site"
    run_python(["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], folder, None)
    return site


def check_cost(output: str) -> None:
    cost = json.loads(output)
    assert cost["cache_bytes"] == 157.25 * 2**20
    assert {
        "placement",
        "model",
        "device",
        "context",
        "batch",
        "decode_tok_s",
        "prefill_tok_s",
        "step_ms",
        "source",
    } <= set(cost)


def test_wheel(installed_wheel, tmp_path):
    package, kernels, profiles, there = json.loads(run_python(["-c", WHERE], tmp_path, str(installed_wheel)))
    assert there
    for place in (package, kernels, profiles):
        assert Path(place).is_relative_to(installed_wheel), place
    shipped = {path.name for path in Path(profiles).iterdir()}
    assert {path.name for path in (ROOT / "profiles").glob("*.csv")} <= shipped
    recipes = {path.name for path in (installed_wheel / "nasbench" / "recipes").iterdir()}
    assert recipes == {path.name for path in (ROOT / "nasbench" / "recipes").glob("*.toml")}
    check_cost(run_python(COST, tmp_path, str(installed_wheel)))


def test_bare_checkout(tmp_path):
    # -S would hide the editable install but also the dependencies: a copy of the tree stands in for a checkout.
    for folder in ("nasbench", "kernels", "profiles"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    package, _kernels, _profiles, there = json.loads(run_python(["-c", WHERE], tmp_path, str(tmp_path)))
    assert there
    assert Path(package).is_relative_to(tmp_path)
    check_cost(run_python(COST, tmp_path, str(tmp_path)))


def test_editable(tmp_path):
    check_cost(run_python(COST, tmp_path, None))
