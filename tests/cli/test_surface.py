"""The command line as people see it: every command, argument and option stands in surface.txt. Whoever changes one
changes the file, too: `python tests/cli/test_surface.py` writes it."""

import shlex
import sys
from pathlib import Path

import typer

from nasbench.cli.examples import EXAMPLES
from nasbench.cli.main import app, parse

FILE = Path(__file__).parent / "surface.txt"


def lines(command, name):
    """`nasbench NAME`, then a line per parameter."""
    children = getattr(command, "commands", None)
    if children:
        for child in sorted(children):
            yield from lines(children[child], f"{name} {child}")
        return
    yield name
    for each in command.params:
        if each.param_type_name == "argument":
            yield f"    {each.name.upper()}{' ...' if each.nargs == -1 else ''}"
        elif "--help" not in each.opts:
            yield f"    {' '.join([*each.opts, *each.secondary_opts])}{' (needed)' if each.required else ''}"


def surface():
    return "\n".join(lines(typer.main.get_command(app), "nasbench")) + "\n"


def test_the_surface_is_as_written():
    assert surface() == FILE.read_text(), "the command line changed: run `python tests/cli/test_surface.py`, and say so"


def test_examples_are_legal():
    for line in EXAMPLES:
        program, *words = shlex.split(line)
        assert program == "nasbench"
        parse(words)


def test_every_command_has_an_example():
    named = {" ".join(line.split()[1:3]) for line in EXAMPLES}
    for line in FILE.read_text().splitlines():
        if line.startswith("nasbench ") and line.split()[1] != "db":
            assert any(f"{words} ".startswith(f"{line.partition(' ')[2]} ") for words in named), line


if __name__ == "__main__":
    FILE.write_text(surface())
    sys.exit(0)
