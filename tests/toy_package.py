"""The mixer Z of docs/add-a-block.md, an FFN `square` and a family `toy`, installed as another package would."""

import importlib
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from nasbench.checkpoints.families import FAMILIES
from nasbench.model import FFNS, MIXERS

PAGE = (Path(__file__).parents[1] / "docs" / "add-a-block.md").read_text(encoding="utf-8")
MODULES = ("running_mean", "toy_ffn", "toy_family")


def fenced(language):
    """The page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


MIXER = tomllib.loads(fenced("toml")[0])["project"]["entry-points"]["nasbench.blocks"]["Z"]
ENTRY_POINTS = f"""
[nasbench.blocks]
Z = {MIXER}
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
    (site / "running_mean.py").write_text(fenced("python")[0], encoding="utf-8")
    for name in MODULES[1:]:
        shutil.copy(Path(__file__).parent / "toys" / f"{name}.py", site)
    monkeypatch.syspath_prepend(str(site))
    for registry in (MIXERS, FFNS, FAMILIES):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
        monkeypatch.setattr(registry, "_discovered", False)
    importlib.invalidate_caches()
    yield info
    for name in MODULES:
        sys.modules.pop(name, None)
