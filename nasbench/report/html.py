"""The report's page: a verdict, figures and tables in one file that loads nothing from anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nasbench.core.files import atomic_path, write_text
from nasbench.core.sizes import format_size
from nasbench.model import MIXERS
from nasbench.report import style
from nasbench.report.comparison import tables
from nasbench.report.comparison_figures import comparison_drawings
from nasbench.report.drawing import Draw
from nasbench.report.facts import Facts
from nasbench.report.figures import drawings
from nasbench.report.front_tables import front_table, missing_table, source_table, target_table, validation_table
from nasbench.report.front_tables import number as cell_number
from nasbench.report.sections import Section, markdown, sections
from nasbench.report.svg import Rendered, rendered
from nasbench.report.targets import target_words
from nasbench.report.verdict import Verdict, listed, verdicts
from nasbench.spaces.placement import Placement, format_placement
from nasbench.spaces.space import is_full

HERE = Path(__file__).parent
TITLES = {
    "pareto": "Accuracy against decode speed, with the placement of every point of the front",
    "layer-importance": "What each layer costs replaced alone, by task and layer kind",
    "whole-model": "Decode, prompt, memory and energy against context, recommended placement and full attention",
    "speed-and-cache": "Decode time and cache size of one layer against context, by layer kind",
    "roofline": "What every block reached of the device's bandwidth and matrix rate",
    "predicted-against-measured": "Predicted against measured decode speed",
    "training": "Losses while the alternatives were trained",
}


@dataclass(frozen=True)
class Page:
    """Everything that is written of a report: figures and tables by file name, each made once."""

    facts: Facts
    verdicts: list[Verdict]
    best: int
    figures: dict[str, Rendered]
    compared: list[str]
    fronts: list[Section]
    sections: list[Section]
    others: dict[str, Section]
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Facts) -> Page:
        """Draws every figure and fills every table."""
        draws: dict[str, tuple[str, Draw]] = {
            name: (TITLES[name.rstrip("-0123456789")], draw) for name, draw in drawings(facts).items()
        }
        compared = comparison_drawings(facts.comparison)
        figures = {name: rendered(draw, name, title) for name, (title, draw) in (draws | compared).items()}
        fronts = [target for target in facts.targets if target.points]
        others = [target_table(facts), validation_table(facts), missing_table(facts), source_table(facts)]
        measured = facts.comparison.measured
        frames = {name: getattr(facts, attribute) for name, attribute in FRAMES.items()}
        return cls(
            facts,
            *verdicts(facts),
            figures,
            list(compared),
            [front_table(target, count) for count, target in enumerate(fronts, 1)],
            sections(facts.comparison) if measured else [],
            {each.name: each for each in others if each.rows},
            {**frames, **(tables(facts.comparison) if measured else {})},
        )

    @property
    def tables(self) -> list[Section]:
        return [*self.fronts, *self.sections, *self.others.values()]

    def summary(self) -> str:
        """The verdict and all tables as Markdown."""
        told = self.verdicts[self.best] if self.verdicts else None
        text = f"# Hybrid attention for {self.facts.shape.name}\n\n"
        if told is not None:
            text += "\n".join(told.sentences) + "\n\n" + "".join(f"    {line}\n" for line in told.commands) + "\n"
            text += "".join(f"- {line}\n" for line in told.cautions) + "\n"
        return text + markdown(self.tables)

    @property
    def recommendation(self) -> dict[str, Any] | None:
        """The recommended placement in figures, for --json."""
        if not self.verdicts:
            return None
        told = self.verdicts[self.best]
        point, row = told.point, told.point.row
        numbers = {"loss_above_model": point.delta, "loss_above_model_other_text": point.test.mean}
        numbers |= {"decode_tok_s": point.tok_s, "speedup": point.speedup}
        known = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        about = {"placement": row.placement, "k": row.k, **known, "basis": point.basis, "cache_bytes": row.cache_bytes}
        return {**about, "commands": list(told.commands), "cautions": list(told.cautions)}

    def html(self) -> str:
        facts = self.facts
        values = {"facts": facts, "main": facts.main, "introduction": introduction(facts)}
        return template("page.html", [facts], page=self, **values)

    def write(self, folder: Path) -> Path:
        """Writes index.html (its path is returned), summary.md, figures (PNG, SVG) and tables (CSV, Markdown).

        Raises MachineError where the folder cannot be written.
        """
        texts = {"summary.md": self.summary(), "index.html": self.html()}
        write_files(folder, texts, self.figures, self.tables, self.frames)
        return folder / "index.html"


FRAMES = {
    "layer-importance": "importance", "whole-model": "whole", "speed-and-cache": "curves", "roofline": "roofline",
    "training": "training",
}  # fmt: skip
"""Data behind figures: the file's name, and the frame of the facts."""


def introduction(facts: Facts) -> str:
    """What was done, plainly, as far as the run has got."""
    text = f"The model is {facts.teacher}: {facts.shape.num_layers} layers, all with full attention."
    learned = set(facts.training["name"])
    trained = [title for name, title in facts.kinds if name in learned]
    kept = [title for name, title in facts.kinds if not is_full(name) and name not in learned]
    if trained:
        text += f" {listed(trained)} learned by distillation to do the work of each layer's attention."
        names = listed(kept)
        text += f" {names[:1].upper()}{names[1:]} keeps the attention's weights." if kept else ""
    if facts.main:
        times = "estimated" if facts.main.estimated else "measured"
        text += (
            f" Then {len(facts.main.trials):,} placements were scored on held-out text, and their decode speed was "
            f"predicted from {times} layer times."
        )
    return text


def strip(placement: Placement) -> Markup:
    """A placement as a row of coloured cells; full attention is taller, so that colour is not all there is."""
    cells = Markup("").join(Markup('<i class="{}"></i>').format(style.css_class(name)) for name in placement)
    return Markup('<span class="strip" role="img" aria-label="{}">{}</span>').format(format_placement(placement), cells)


def template(name: str, shown: Sequence[Facts], **values: Any) -> str:
    """A page's HTML: its own template inside the one that all share."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": cell_number, "strip": strip, "size": format_size, "target": target_words}
    kinds = {style.css_class(name): (name, title) for each in shown for name, title in each.kinds}
    if len(shown) > 1:  # runs differ in the arguments of a kind
        kinds = {css: (css[-1], MIXERS[css[-1]].title) for css in kinds}
    colours = "".join(f".{css}{{background:{style.colour(name)}}}" for css, (name, _) in sorted(kinds.items()))
    return environment.get_template(name).render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8") + colours),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        legend=[(css, name, title) for css, (name, title) in kinds.items()],
        **values,
    )


def write_files(
    folder: Path,
    texts: dict[str, str],
    figures: dict[str, Rendered],
    sections: Iterable[Section],
    frames: dict[str, pd.DataFrame] | None = None,
) -> None:
    """Writes the texts by file name, and folders of figures and tables, which replace those of an earlier report."""
    with atomic_path(folder / "figures", folder=True) as place:
        for name, figure in figures.items():
            (place / f"{name}.svg").write_text(figure.svg, encoding="utf-8")
            (place / f"{name}.png").write_bytes(figure.png)
    with atomic_path(folder / "tables", folder=True) as place:
        for name, frame in (frames or {}).items():
            frame.to_csv(place / f"{name}.csv", index=False, float_format="%.6g")
        for section in sections:
            (place / f"{section.name}.csv").write_text(section.csv, encoding="utf-8")
            (place / f"{section.name}.md").write_text(markdown([section]), encoding="utf-8")
    for name, text in texts.items():
        write_text(folder / name, text)
