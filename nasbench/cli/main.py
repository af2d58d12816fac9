"""The command line: registers the commands, and turns errors into one line and an exit code.

A command module imports nothing heavy at its top: `nasbench --help` answers in well under half a second.
"""

from __future__ import annotations

import sys

import click
import typer

from nasbench.errors import NasbenchError, UserError, unknown

app = typer.Typer(
    name="nasbench",
    help="Find the hybrid of full, sliding-window and linear attention that is the most accurate at a given speed "
    "on your device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
