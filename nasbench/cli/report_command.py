"""`nasbench report`: one HTML file and PNGs of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/NAME.")],
    db: Annotated[Path | None, typer.Option(help="Folder or file of profile databases.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write runs/NAME/report/index.html and a PNG of every figure; prints the page's path."""
    from nasbench.cli.common import print_json
    from nasbench.report.html import report
    from nasbench.runs import Run

    path = report(Run.open(run), db)
    if json:
        print_json({"report": str(path), "pngs": sorted(str(png) for png in path.parent.glob("*.png"))})
    else:
        print(path)
