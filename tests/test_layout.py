"""The import direction of DESIGN: which part may know which. Read from the source, so that nothing slips in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOUNDATION = {"errors", "registry", "config", "files", "runs"}

# part -> the parts that it may import, besides the foundation and itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "registry": set(),
    "config": set(),
    "files": set(),
    "runs": {"spaces"},
    "spaces": set(),
    "blocks": {"spaces"},
    "devices": set(),
    "backbone": {"spaces", "blocks"},
    "engine": {"spaces", "blocks", "backbone", "devices"},
    "store": set(),
    "profiling": {"spaces", "blocks", "devices", "backbone", "store"},
    "cost": {"spaces", "blocks", "backbone", "store"},
    "supernet": {"spaces", "blocks", "backbone", "engine"},
    "evaluation": {"spaces", "blocks", "backbone", "engine", "supernet"},
    "pareto": set(),
    "search": {"spaces", "backbone", "store", "cost", "evaluation", "pareto"},
    "report": {"spaces", "blocks", "backbone", "store", "cost", "search", "pareto"},
    "end_to_end": {"spaces", "backbone", "engine", "devices", "cost"},
    "validation": {"spaces", "backbone", "engine", "store", "cost", "search", "end_to_end"},
    "reproduce": {"spaces", "backbone", "devices", "engine", "supernet", "evaluation", "search", "report"},
    "export": {"spaces", "blocks", "backbone", "supernet"},
}
NO_TORCH = ["errors", "registry", "config", "files", "runs", "spaces", "store", "cost", "pareto", "devices"]


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
    if part in ("__init__", "__main__", "cli", "quickstart"):
        return
    assert part in ALLOWED, f"{part} has no place in the import direction: give it one here and in CONTRIBUTING"
    parts = {name.split(".")[1] for name in imported_modules(path) if name.startswith("nasbench.")}
    known = {p for p in parts if p in ALLOWED or p in ("cli", "quickstart")}
    assert known - {part} <= ALLOWED[part] | FOUNDATION, f"{path} imports {known - {part} - ALLOWED[part] - FOUNDATION}"


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) in NO_TORCH], ids=lambda p: str(p.relative_to(ROOT)))
def test_costs_need_no_torch(path):
    assert "torch" not in {name.split(".")[0] for name in imported_modules(path, runtime_only=True)}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_of_nasbench(path):
    assert "nasbench" not in {name.split(".")[0] for name in imported_modules(path)}


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


LONGER = [*SOURCES, *sorted((ROOT / "kernels").rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]


@pytest.mark.parametrize("path", LONGER, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
