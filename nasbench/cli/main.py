"""The command line's root: registers the commands, turns errors into one line and an exit code.

A command module imports nothing heavy at its top, so that `nasbench --help` answers at once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from nasbench import __version__
from nasbench.cli.common import Output
from nasbench.cli.examples import EXAMPLES
from nasbench.core.errors import NasbenchError

COMMANDS = (
    "quickstart",
    "run",
    "init",
    "doctor",
    "devices",
    "models",
    "profile",
    "db",
    "cost",
    "throughput",
    "validate",
    "corpus",
    "distill",
    "select_block",
    "search_dims",
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


def _with_quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """The command with --quiet, which no command needs to take itself."""

    @functools.wraps(function)
    def call(*args: Any, quiet: bool = False, **options: Any) -> Any:
        Output.quiet = Output.quiet or quiet
        return function(*args, **options)

    option = typer.Option("--quiet", "-q", help="Nothing on standard error but errors.")
    own = inspect.signature(function, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    quiet = inspect.Parameter("quiet", kind, default=False, annotation=Annotated[bool, option])
    call.__signature__ = own.replace(parameters=[*own.parameters.values(), quiet])  # type: ignore[attr-defined]
    call.__annotations__ = {name: each.annotation for name, each in call.__signature__.parameters.items()}  # type: ignore[attr-defined]
    return call


def _examples(*names: str) -> str | None:
    """The epilog of a command's help."""
    lines = [line for line in EXAMPLES if line.split()[1 : 1 + len(names)] == list(names)]
    return "\n\n".join(["Examples:", *lines]) if lines else None


for _name in COMMANDS:
    _command = importlib.import_module(f"nasbench.cli.{_name}_command").command
    if isinstance(_command, typer.Typer):
        for _info in _command.registered_commands:
            assert _info.callback is not None
            _info.callback, _info.epilog = _with_quiet(_info.callback), _examples(_name, str(_info.name))
        app.add_typer(_command, name=_name)
    else:
        app.command(_name.replace("_", "-"), epilog=_examples(_name))(_with_quiet(_command))


def parse(args: list[str]) -> None:
    """Checks the options of one command line and runs nothing. Raises the parser's error for wrong ones."""
    group = typer.main.get_command(app)
    parent = group.make_context("nasbench", list(args), resilient_parsing=True)
    name, found, rest = group.resolve_command(parent, list(args))  # type: ignore[attr-defined]
    found.make_context(name, rest, parent=parent)


def _wait_briefly() -> None:
    """Threads of OpenMP that wait for others give their core away after some 50 us, where the user says nothing else.
    By default they spin for milliseconds. On two cores with load 9, training steps took 13 to 18 s with the default,
    0.5 to 2 s so. OpenMP reads this when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GCC's, which torch's wheels carry
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's and LLVM's, milliseconds


def _fail(message: str, code: int) -> int:
    print(f"nasbench: {' '.join(message.split())}", file=sys.stderr)
    return code


def run(args: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C."""
    _wait_briefly()
    quiet = Output.quiet
    # Huge pages for torch's large tensors, before the first one is made: without them the speed of a CPU's caches
    # depends on when they were allocated, by a fifth, and a profile's were allocated earlier than a decoder's.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
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
    finally:
        Output.quiet = quiet  # a recipe runs many commands in one process


def main() -> None:
    """Entry point of the `nasbench` script and of `python -m nasbench`."""
    sys.exit(run())
