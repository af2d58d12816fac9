"""The report's page: facts in words, tables and figures, in one file that loads nothing from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nasbench.core.files import atomic_path, machine_errors, write_text
from nasbench.core.sizes import format_size
from nasbench.report import style
from nasbench.report.comparison import tables
from nasbench.report.comparison_figures import comparison_drawings
from nasbench.report.facts import Facts, Point, TargetFacts, collect, target_words
from nasbench.report.figures import Draw, drawings
from nasbench.report.sections import markdown, sections
from nasbench.report.svg import inline_svg, png
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement
from nasbench.spaces.space import is_full

HERE = Path(__file__).parent
WITHIN = 0.05
"""Perplexity increase within which the summary names the fastest placement."""

TITLES = {
    "pareto": "Loss against predicted decode speed, with the placement of every point of the front",
    "layer-importance": "Loss increase of replacing each layer alone, by layer kind",
    "speed-and-cache": "Decode time and cache size of one layer against context, by layer kind",
    "predicted-against-measured": "Predicted against measured decode speed",
    "training": "Losses while the alternatives were trained",
}


@dataclass(frozen=True)
class Headline:
    """The points that the summary names: the fastest within WITHIN, and the fastest of all."""

    near: Point | None
    fastest: Point | None


def headline(target: TargetFacts) -> Headline:
    """Picks them among the hybrids of the front."""
    hybrids = [point for point in target.points if point.row.k < len(point.row.layers) and not math.isnan(point.delta)]
    near = [point for point in hybrids if point.delta <= math.log1p(WITHIN)]
    fastest: Callable[[Point], float] = lambda point: point.row.decode_tok_s  # noqa: E731
    return Headline(max(near, key=fastest, default=None), max(hybrids, key=fastest, default=None))


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def introduction(facts: Facts) -> str:
    """What was done, plainly, as far as the run has got."""
    text = f"The model is {facts.teacher}: {facts.shape.num_layers} layers, all with full attention."
    learned = set(facts.training["name"])
    trained = [title for name, title in facts.kinds if name in learned]
    kept = [title for name, title in facts.kinds if not is_full(name) and name not in learned]
    if trained:
        text += (
            f" Beside the attention of every layer, {listed(trained)} learned by distillation to do its work, "
            "everything else frozen."
        )
        text += f" Another alternative, {listed(kept)}, keeps the attention's weights." if kept else ""
    if facts.main:
        times = "estimated" if facts.main.estimated else "measured"
        text += (
            f" Then {len(facts.main.trials)} placements of full attention and its replacements were scored on "
            "held-out text by their divergence from the model and their loss, and by the decode speed that a cost "
            f"model predicts from {times} layer times."
        )
    return text


def number(value: float | None, form: str = ",.4f", unknown: str = "–") -> str:
    """A formatted number with a real minus sign; a dash where it is not known."""
    if value is None or math.isnan(value):
        return unknown
    return format(value, form).replace("-", "−")


def speed(value: float, estimated: bool = False) -> Markup:
    """Tokens/s in three to four digits; estimated ones carry a mark."""
    mark = Markup('<abbr class="estimated" title="rests on estimated rows">~</abbr>') if estimated else Markup("")
    return mark + number(value, ",.0f" if abs(value) >= 1000 else ",.1f")


def strip(placement: Placement) -> Markup:
    """A placement as a row of coloured cells; full attention is taller, so that colour is not all there is."""
    cells = Markup("").join(Markup('<i class="{}"></i>').format(style.css_class(name)) for name in placement)
    return Markup('<span class="strip" role="img" aria-label="{}">{}</span>').format(format_placement(placement), cells)


def all_drawings(facts: Facts) -> dict[str, tuple[str, Draw]]:
    """(title, function) of every figure of the page, by file name."""
    named = {name: (TITLES[name.rstrip("-0123456789")], draw) for name, draw in drawings(facts).items()}
    return named | comparison_drawings(facts.comparison)


def figure_markup(name: str, title: str, draw: Draw) -> Markup:
    """A figure as two inline SVGs, of which the page shows the one that fits."""
    return Markup("").join(
        Markup('<div class="{}">').format(width)
        + Markup(inline_svg(draw, name, title, width == "narrow"))
        + Markup("</div>")
        for width in ("wide", "narrow")
    )


def render(facts: Facts) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "strip": strip, "size": format_size, "target": target_words}
    environment.globals |= {"speed": speed, "within": WITHIN, "isnan": math.isnan}
    colours = "".join(
        sorted({f".{style.css_class(name)}{{background:{style.colour(name)}}}" for name, _ in facts.kinds})
    )
    drawn = all_drawings(facts)
    return environment.get_template("page.html").render(
        facts=facts,
        main=facts.main,
        headline=headline(facts.main) if facts.main else None,
        figures={name: figure_markup(name, title, draw) for name, (title, draw) in drawn.items()},
        compared={name: title for name, (title, _) in comparison_drawings(facts.comparison).items()},
        sections=sections(facts.comparison) if facts.comparison.measured else [],
        tables=sorted(tables(facts.comparison)) if facts.comparison.measured else [],
        css=Markup((HERE / "page.css").read_text(encoding="utf-8") + colours),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        introduction=introduction(facts),
        legend=[(style.css_class(name), name, title) for name, title in facts.kinds],
    )


def report(run: Run, db: Path | None = None) -> Path:
    """Writes runs/NAME/report/: index.html, a PNG of every figure, a CSV of every table of the comparison, summary.md.

    Args:
        db: folder or file of profile databases; None for the shipped and the user's.

    Raises:
        UserError: a damaged file of the run. MachineError: the folder cannot be written.
    """
    facts = collect(run, db)
    page = render(facts)
    with machine_errors(f"writing {run.report}"):
        run.report.mkdir(parents=True, exist_ok=True)
    for name, (_, draw) in all_drawings(facts).items():
        with atomic_path(run.report / f"{name}.png") as temporary:
            temporary.write_bytes(png(draw, name))
    if facts.comparison.measured:
        for name, table in tables(facts.comparison).items():
            write_text(run.report / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
        write_text(run.report / "summary.md", markdown(sections(facts.comparison)))
    path = run.report / "index.html"
    write_text(path, page)
    return path
