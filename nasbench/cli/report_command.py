"""`nasbench report`: one HTML file, figures and tables of a run, or of several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasbench.core.errors import UserError


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folder, e.g. runs/NAME; several with --compare.")],
    compare: Annotated[bool, typer.Option("--compare", help="Set several runs beside each other.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: report/ in the (first) run.")] = None,
    db: Annotated[Path | None, typer.Option(help="Folder or file of profile databases; default: the run's.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write index.html, and every figure (PNG, SVG) and table (CSV, Markdown); prints the page's path."""
    from nasbench.cli.common import print_json
    from nasbench.report.compare import RunsPage
    from nasbench.report.facts import collect
    from nasbench.report.html import Page
    from nasbench.runs import Run
    from nasbench.search.run_target import run_db

    if compare != (len(runs) > 1):
        raise UserError("write one run, or --compare and at least two")
    opened = [Run.open(run) for run in runs]
    facts = [collect(run, run_db(run, db)) for run in opened]
    page = RunsPage.of(facts) if compare else Page.of(facts[0])
    path = page.write(out or (opened[0].report / "compared" if compare else opened[0].report))
    if json:
        figures = sorted(str(figure) for figure in (path.parent / "figures").glob("*.png"))
        print_json({"report": str(path), "recommended": page.recommendation, "figures": figures})
    else:
        print(path)
