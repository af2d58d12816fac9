"""The model card of an exported folder, README.md: what it is, what was measured, how to load it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from nasbench.core.tables import read_table
from nasbench.evaluation.scores import ScoreStore
from nasbench.runs import Run
from nasbench.search.validation import ValidationRow
from nasbench.spaces.placement import Placement, format_placement

UNKNOWN = "unknown"
LICENCES = {"SmolLM2-135M": "apache-2.0"}
"""Of models that come without a folder of their own, by the beginning of their source."""


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        base: the model that the placement was searched for.
        weights: which they are, in words.
        finalised: whether the placement was distilled on after the supernet.
        licence: of the base model, "unknown" where its folder does not say.
        scores: (task, metric, value, standard error, items, settings, dtype), of these very weights.
        speeds: of validation.csv, measured end to end.
    """

    placement: str
    base: str
    weights: str
    finalised: bool
    licence: str
    scores: list[tuple[str, str, str, str, int, str, str]] = field(default_factory=list)
    speeds: list[ValidationRow] = field(default_factory=list)


def card_of(run: Run, placement: Placement, base: str, source: Path, version: str, finalised: bool) -> Card:
    """The card of a run's placement.

    Args:
        source: the base model's folder.
        version: of the weights, as scores name them.
    """
    text = format_placement(placement)
    found = ScoreStore(run.scores).find(placement=text, weights=version)
    scores = [
        (key.task, s.metric, f"{s.value:.4f}", f"{s.stderr:.4f}" if s.n > 1 else "", s.n, key.settings, key.dtype)
        for key, s in found.items()
        if not key.settings.startswith("search/")
    ]
    speeds = [row for row in read_table(run.validation, ValidationRow, exact=False) if row.placement == text]
    # A folder's path is nobody else's business.
    name = Path(base).name if Path(base).exists() else base
    weights = f"{'finalised' if finalised else 'of the supernet'}, version {version}"
    return Card(text, name, weights, finalised, licence_of(source, base), sorted(scores), speeds)


def licence_of(folder: Path, source: str) -> str:
    """The `license:` of the folder's own card, as hubs read it."""
    readme = folder / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace").partition("\n---")[0] if readme.is_file() else ""
    match = re.search(r"^license: *([\w.+-]+) *$", head, re.MULTILINE) if head.startswith("---") else None
    known = (licence for name, licence in LICENCES.items() if source.startswith(name))
    return match[1] if match else next(known, UNKNOWN)


def write_card(card: Card, config: dict[str, object], path: Path) -> None:
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("nasbench", "export"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    ).get_template("card.md")  # fmt: skip
    path.write_text(template.render(card=card, config=config), encoding="utf-8")
