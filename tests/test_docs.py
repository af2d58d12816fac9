"""The documentation: every command in it is legal, every link leads to a file, the site builds."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from nasbench.cli.main import app, parse

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "profiles" / "README.md"])
WRAPPED = re.compile(r"^torchrun --nproc-per-node \d+ -m ")


def code_lines(text):
    """The lines of indented and fenced code, continued lines joined."""
    found, fenced = [], False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(WRAPPED.sub("", line.strip()))
    return found


def commands(text):
    """Whole command lines. A stage with a sentence behind it is no command line: `nasbench profile    measures ...`."""
    lines = [line.removeprefix("$ ") for line in code_lines(text)]
    mine = [line for line in lines if re.match(r"nasbench [a-z]", line)]
    return [shlex.split(line, comments=True) for line in mine if not re.match(r"nasbench \S+ {2,}\w", line)]


def inline(text):
    return [shlex.split(code) for code in re.findall(r"`(nasbench [a-z][^`]*)`", text)]


def tree(command, name=""):
    """Options of every command by its words."""
    children = getattr(command, "commands", None)
    if children:
        return {key: value for each in children for key, value in tree(children[each], f"{name} {each}").items()}
    return {name.strip(): {option for each in command.params for option in (*each.opts, *each.secondary_opts)}}


KNOWN = tree(typer.main.get_command(app))


def test_pages_have_commands():
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 50


def test_reports_say_which_commit_has_a_command_that_is_gone():
    """What made a page stays in it, as it was typed."""
    gone = re.compile(r"\b(nasbench reproduce|benchmarks/\w+\.py|--names)\b")
    for page in (*ROOT.glob("reports/**/*.md"), *ROOT.glob("reports/**/*.html")):
        text = page.read_text(encoding="utf-8")
        absent = [name for name in gone.findall(text) if not (ROOT / name).is_file()]
        assert not absent or re.search(r"Commit [0-9a-f]{7} has", text), (page, absent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_legal(page):
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            parse(words[1:])
        except Exception as error:
            pytest.fail(f"{shlex.join(words)}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_exist(page):
    """A sentence may leave arguments out: the command and its options must be there."""
    for words in inline(page.read_text(encoding="utf-8")):
        names = [name for name in KNOWN if words[1 : 1 + len(name.split())] == name.split()]
        groups = [name for name in KNOWN if name.split()[0] == words[1]]
        assert names or (groups and len(words) == 2), shlex.join(words)
        for name in names:
            assert {word for word in words if word.startswith("--")} <= KNOWN[name] | {"--help"}, shlex.join(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#", "mailto")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"
    for include in re.findall(r'^--8<-- "([^"]+)"$', text, re.MULTILINE):
        assert (ROOT / include).is_file()


def test_every_page_is_in_the_navigation():
    told = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in ROOT.glob("docs/*.md")} == set(re.findall(r"[\w-]+\.md", told))


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "nasbench.api.cost" in page
    assert (tmp_path / "site" / "notebooks" / "profile-and-cost.ipynb").is_file()
