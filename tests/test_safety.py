"""What the syntax tree must not hold: code from data, shells, pickles, remote code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for part in ("nasbench", "benchmarks", "kernels") for path in (ROOT / part).rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"os.system", "os.popen", "torch.load", "torch.save", "subprocess.getoutput", "yaml.load", "numpy.load"}
OPTIONS = {"shell", "trust_remote_code", "allow_pickle"}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(tree):
    """(line, what) of everything that could run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        else:
            names = {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
        for name in names & MODULES:
            yield node.lineno, name
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS or name.replace("np.", "numpy.") in METHODS:
                yield node.lineno, name
            for option in node.keywords:
                if option.arg in OPTIONS and not (
                    isinstance(option.value, ast.Constant) and option.value.value is False
                ):
                    yield node.lineno, option.arg


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "torch.load(path)",
        "os.system('x')",
        "run('x', shell=True)",
        "from_pretrained(name, trust_remote_code=flag)",
        "np.load(path)",
    ],
)
def test_dangers_are_seen(code):
    assert list(dangers(ast.parse(code)))


def test_nothing_runs_what_a_file_says():
    assert len(FILES) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in FILES
        for line, what in dangers(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []
