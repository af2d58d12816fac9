"""The command line's root: registers the commands, turns errors into one line and an exit code.

A command module imports nothing heavy at its top, so that `nasbench --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from nasbench import __version__
from nasbench.core.errors import NasbenchError

COMMANDS = (
    "quickstart",
    "run",
    "devices",
    "models",
    "profile",
    "db",
    "cost",
    "throughput",
    "validate",
    "corpus",
    "distill",
    "search",
    "eval",
    "finalize",
    "report",
    "export",
    "generate",
)
"""In the order of `--help`. Each is `nasbench/cli/<name>_command.py` with a function, or a Typer app, `command`."""

app = typer.Typer(
    name="nasbench",
    help="Find the hybrid of full, sliding-window and linear attention that is the most accurate at a given speed "
    "on your device.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nasbench {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find the hybrid of full, sliding-window and linear attention that is the most accurate at a given speed."""


for _name in COMMANDS:
    _command = importlib.import_module(f"nasbench.cli.{_name}_command").command
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name)(_command)


def parse(args: list[str]) -> None:
    """Checks the options of one command line and runs nothing. Raises the parser's error for wrong ones."""
    group = typer.main.get_command(app)
    parent = group.make_context("nasbench", list(args), resilient_parsing=True)
    name, found, rest = group.resolve_command(parent, list(args))  # type: ignore[attr-defined]
    found.make_context(name, rest, parent=parent)


def _fail(message: str, code: int) -> int:
    print(f"nasbench: {' '.join(message.split())}", file=sys.stderr)
    return code


def run(args: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C."""
    try:
        result = app(args, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except NasbenchError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped; the same command continues from here", 130)
    except BrokenPipeError:
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", 1)
    except Exception as error:
        # The parser's own errors: typer vendors click in some versions and imports it in others, so no class is named.
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message() or "no command given: see nasbench --help", getattr(error, "exit_code", 2))


def main() -> None:
    """Entry point of the `nasbench` script and of `python -m nasbench`."""
    sys.exit(run())
