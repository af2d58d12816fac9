"""Toys: a mixer Z, an FFN `square` and a family `toy`, installed as another package would install them."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest

from nasbench.checkpoints.families import FAMILIES
from nasbench.model import FFNS, MIXERS

MODULES = ("toy_mixer", "toy_ffn", "toy_family")
ENTRY_POINTS = """
[nasbench.blocks]
Z = toy_mixer:MeanSpec
[nasbench.ffns]
square = toy_ffn:SquareSpec
[nasbench.families]
toy = toy_family:Toy
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Installs the package for one test; the registries have not looked at entry points yet. Yields its .dist-info."""
    site = tmp_path / "site"
    info = site / "toys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    for name in MODULES:
        shutil.copy(Path(__file__).parent / "toys" / f"{name}.py", site)
    monkeypatch.syspath_prepend(str(site))
    for registry in (MIXERS, FFNS, FAMILIES):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
        monkeypatch.setattr(registry, "_discovered", False)
    importlib.invalidate_caches()
    yield info
    for name in MODULES:
        sys.modules.pop(name, None)
