"""The cache's size is one number: by formula, as the allocator gave it to the shipped rows, in the documentation."""

from pathlib import Path

import pytest

from nasbench.model.shapes import MODELS
from nasbench.store import read_db

PROFILES = Path(__file__).parents[2] / "profiles"


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.csv")), ids=lambda path: path.stem)
def test_shipped_rows_agree_with_the_formula(path):
    rows = [row for row in read_db(path) if row.status == "ok" and row.cache_bytes is not None]
    assert rows
    for row in rows:
        assert row.cache_bytes == row.cache_formula_bytes, row.key


@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("smollm2-135m", "qwen2.5-3b")])
def test_the_documentation_prints_what_the_formula_gives(model):
    shape = MODELS[model]
    mib = shape.cache_bytes(shape.placement, 1, 65536) / 2**20
    lines = (PROFILES / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| `{model}` |")]
    assert line.split("|")[2].strip() == f"{mib:g}"
