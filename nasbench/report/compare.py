"""Several runs beside each other: their recommended placements, their fronts in one figure, and each K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nasbench.core.errors import UserError
from nasbench.report import style
from nasbench.report.drawing import Drawing, new_figure, thousands
from nasbench.report.facts import Facts
from nasbench.report.front_tables import number, speed
from nasbench.report.html import template, write_files
from nasbench.report.sections import Cell, Section, markdown
from nasbench.report.svg import Rendered, rendered
from nasbench.report.targets import choices, recommended, target_words
from nasbench.report.verdict import Verdict, plus_minus, verdicts

MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class RunsPage:
    """Everything that is written of a comparison of runs."""

    facts: Sequence[Facts]
    names: list[str]
    told: list[Verdict]
    figures: dict[str, Rendered]
    tables: list[Section]

    @classmethod
    def of(cls, facts: Sequence[Facts]) -> RunsPage:
        """Draws and fills it. Raises UserError for a run whose front has no hybrid."""
        names, told = _names(facts), []
        for each in facts:
            found, best = verdicts(each)
            if not found:
                raise UserError(
                    f"{each.run.path} has no searched placement: run `nasbench search {each.run.path} -k 4,8`"
                )
            told.append(found[best])
        title = "Fronts: loss above each run's own model against decode speed"
        figures = {"fronts": rendered(partial(_fronts, facts, names), "fronts", title)}
        return cls(facts, names, told, figures, [_runs(facts, names, told), _counts(facts, names)])

    @property
    def recommendation(self) -> dict[str, Any]:
        """The recommended placement of every run, for --json."""
        return {name: told.point.row.placement for name, told in zip(self.names, self.told, strict=True)}

    def write(self, folder: Path) -> Path:
        """Writes index.html, summary.md, and the figure and tables in every form. Returns the page's path."""
        pairs = list(zip(self.names, self.facts, self.told, strict=True))
        text = "".join(f"## {name}\n\n{' '.join(told.sentences)}\n\n" for name, _, told in pairs)
        page = template("compare.html", self.facts, page=self, pairs=pairs)
        write_files(folder, {"summary.md": text + markdown(self.tables), "index.html": page}, self.figures, self.tables)
        return folder / "index.html"


def _names(facts: Sequence[Facts]) -> list[str]:
    """The runs' folder names, with as much of the path as tells them apart."""
    paths = [each.run.path.resolve() for each in facts]
    short = [path.name for path in paths]
    return short if len(set(short)) == len(short) else [str(each.run.path) for each in facts]


def _runs(facts: Sequence[Facts], names: Sequence[str], told: Sequence[Verdict]) -> Section:
    rows = []
    for name, each, verdict in zip(names, facts, told, strict=True):
        point, target = verdict.point, each.main
        assert target is not None
        test = plus_minus(point.test) if point.test.n else ""
        rows.append(
            [
                Cell(name), Cell(each.shape.name), Cell(target_words(target.target)),
                Cell(point.row.placement, placement=point.row.layers), Cell(str(point.row.k)),
                Cell(number(point.delta, "+.4f")), Cell(test),
                Cell(f"{speed(point.tok_s)} {point.basis}", estimated=point.basis == "estimated"),
                Cell(f"{number(point.speedup, '.2f')}×"), Cell(number(point.row.cache_bytes / 2**20, ",.0f")),
            ]
        )  # fmt: skip
    head = ["run", "model", "target", "recommended", "K", "loss", "on other text", "tok/s", "speed-up", "cache MiB"]
    words = "Loss: above the run's own full-attention model, nats a token. Other text: no search saw it."
    return Section("runs", "The runs", words, head, rows)


def _counts(facts: Sequence[Facts], names: Sequence[str]) -> Section:
    """The least loss of every K that a front has."""
    found: list[dict[int, str]] = []
    for each in facts:
        assert each.main is not None
        best: dict[int, str] = {}
        for point in choices(each.main):
            best.setdefault(point.row.k, f"{number(point.delta, '+.4f')}, {point.speedup:.2f}× {point.basis}")
        found.append(best)
    counts = sorted({count for best in found for count in best}, reverse=True)
    rows = [[Cell(str(count)), *(Cell(best.get(count, "")) for best in found)] for count in counts]
    words = "Loss above the run's own model, nats a token, and speed-up over it."
    return Section("by-count", "The best of each K on the fronts", words, ["K", *names], rows)


def _fronts(facts: Sequence[Facts], names: Sequence[str], narrow: bool) -> Drawing:
    drawing = Drawing(new_figure(narrow, 4.2, 3.8))
    axes = drawing.figure.subplots()
    for index, (name, each) in enumerate(zip(names, facts, strict=True)):
        target = each.main
        assert target is not None
        colour, marker = style.PALETTE[index % len(style.PALETTE)], MARKERS[index % len(MARKERS)]
        points = [target.points[0], *choices(target)]
        axes.plot(
            [point.row.decode_tok_s for point in points], [point.delta for point in points],
            color=colour, linestyle=style.dash(index), label=f"{name}, {target.target.device}",
        )  # fmt: skip
        best = recommended(target)
        for point in points:
            gid = f"run-{index}-{point.row.rank}"
            size = 10 if point is best else 5
            fill = style.PAPER if point.estimated else colour
            axes.plot(
                [point.row.decode_tok_s], [point.delta], marker, color=colour, markerfacecolor=fill, markersize=size,
                gid=gid,
            )  # fmt: skip
            drawing.placements[gid] = point.row.placement
            drawing.tips[gid] = (
                f"{name}{', recommended' if point is best else ''}\nK = {point.row.k}\n{point.row.placement}\n"
                f"{point.delta:+.4f} nats a token\n{point.row.decode_tok_s:,.1f} tokens/s "
                f"{'estimated' if point.estimated else 'predicted'}, {point.speedup:.2f} × ({point.basis})"
            )
    axes.set_xlabel("decode tokens/s, predicted; hollow: estimated")
    axes.set_ylabel("loss above the run's own model, nats a token")
    axes.set_title("Fronts; the larger mark is recommended")
    thousands(axes.xaxis)
    drawing.figure.legend(loc="outside lower center", ncols=1 if narrow else 3)
    return drawing
