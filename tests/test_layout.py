"""The import direction: which room may know which. Read from the source, so that nothing slips in."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "core", "spaces", "runs", "devices", "model", "checkpoints", "runtime", "store", "profiling", "cost", "data",
    "parallel", "supernet", "evaluation", "search", "report", "export", "api", "pipeline", "cli",
)  # fmt: skip
"""A room may import itself and those before it."""
NO_TORCH = ["core", "spaces", "runs", "devices", "store"]
NO_TORCH_FILES = {"model/spec.py", "model/shapes.py", "search/pareto.py"}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "nasbench").parts[0].removesuffix(".py")


def imported_modules(path: Path, runtime_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if runtime_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = sorted((ROOT / "nasbench").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    assert part in ROOMS, f"{part} has no place in the import direction: give it one here and in CONTRIBUTING"
    known = {name.split(".")[1] for name in imported_modules(path) if name.startswith("nasbench.")} & set(ROOMS)
    later = known - set(ROOMS[: ROOMS.index(part) + 1])
    assert not later, f"{path} imports {later}, which stand after {part}"


def without_torch(path: Path) -> bool:
    return part_of(path) in NO_TORCH or str(path.relative_to(ROOT / "nasbench")) in NO_TORCH_FILES


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if without_torch(path)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_costs_need_no_torch(path):
    assert "torch" not in {name.split(".")[0] for name in imported_modules(path, runtime_only=True)}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_of_nasbench(path):
    assert "nasbench" not in {name.split(".")[0] for name in imported_modules(path)}


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


BLOCK = r"\([a-z_.]*(mixer|mlp|ffn|block)"
ASKS_FOR_A_KIND = re.compile(rf"isinstance{BLOCK}|hasattr{BLOCK}|kind_of\(")


def test_no_room_asks_for_a_kind_of_block():
    """A mixer or an FFN of another package is as good as ours: specifications answer what differs."""
    others = [path for path in SOURCES if part_of(path) not in ("model", "spaces")]
    assert not [str(path) for path in others if ASKS_FOR_A_KIND.search(path.read_text(encoding="utf-8"))]


LONGER = [*SOURCES, *sorted((ROOT / "kernels").rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]


@pytest.mark.parametrize("path", LONGER, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
