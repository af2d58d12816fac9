"""The tables of benchmarks/ablations.py, from a folder's plan.json and items.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nasbench.core.errors import UserError
from nasbench.core.files import write_text
from nasbench.reproduce.items import Items, Subject, difference, mean_and_error
from nasbench.reproduce.recipe import Plan
from nasbench.search.table import write_rows
from nasbench.spaces.placement import kind_of, parse_placement

STAGES = {"align": "After alignment", "supernet": "After random sub-networks"}
TEACHER, MEAN = "teacher", "mean of "
MEASURES = ("loss", "kl")
Z95 = 1.96


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        transfer: mixers start from the attention's weights.
        own_text: trained on what the model wrote, not on real text.
    """

    transfer: bool
    own_text: bool
    told: str


BASE = "base"
ARMS = {
    BASE: Arm(True, False, "starts from the attention's weights, real text"),
    "no-transfer": Arm(False, False, "starts random, real text"),
    "self": Arm(True, True, "starts from the attention's weights, the model's own text"),
}


@dataclass(frozen=True)
class Row:
    """A row of ablations.csv: an arm after a stage, at a placement. Losses and KL in nats a token; `_se` are standard
    errors over the `rows` held-out rows.

    Attributes:
        tokens: trained on until then, of all stages.
        text_tokens: of the text that they were drawn from; `passes` is how often it was read.
        loss_above_teacher: row by row.
        seconds: of the stage, with building and saving; the first arm's hold the compilation of kernels.
    """

    arm: str
    stage: str
    label: str
    placement: str
    tokens: int
    text_tokens: int
    passes: float
    rows: int
    loss: float
    loss_above_teacher: float
    loss_above_teacher_se: float
    kl: float
    kl_se: float
    seconds: float
    model: str
    sequence: int
    seed: int
    device: str
    dtype: str
    torch: str
    driver: str
    nasbench: str
    measured_utc: str


@dataclass(frozen=True)
class Difference:
    """A row of differences.csv: an arm minus the base over the same held-out rows, in nats a token. `mean of J` is
    the mean over the placements with J, taken in every row of text first."""

    arm: str
    against: str
    stage: str
    label: str
    loss: float
    loss_se: float
    kl: float
    kl_se: float
    rows: int

    def of(self, measure: str) -> tuple[float, float]:
        """(difference, its standard error) of "loss" or "kl"."""
        return getattr(self, measure), getattr(self, f"{measure}_se")


class Results:
    """What a folder holds. Raises UserError where nothing is measured yet."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.plan, self.items = Plan(out / "plan.json"), Items(out / "items.jsonl")
        if not self.plan["stages"]:
            raise UserError(f"nothing measured in {out}: `ablations.py measure --out {out}` does it")
        self.placements: dict[str, str] = self.plan["placements"]
        self.teacher = next(v for (subject, _), v in self.items.values.items() if subject.weights == TEACHER)
        self.keys = [f"{arm}:{stage}" for stage in STAGES for arm in ARMS if f"{arm}:{stage}" in self.plan["stages"]]

    def values(self, key: str, label: str, measure: str) -> np.ndarray:
        """ "loss" or "kl" of every held-out row [n] of an arm after a stage, `arm:stage`, at a placement."""
        found = self.items.get(Subject(self.placements[label], key), measure)
        assert found is not None
        return found

    def fillers(self) -> dict[str, list[str]]:
        """Labels of the placements whose layers beside full attention are of one kind, by that kind."""
        kinds = {
            label: next(n for n in parse_placement(text) if kind_of(n) != "A")
            for label, text in self.placements.items()
        }
        return {kind: [label for label in kinds if kinds[label] == kind] for kind in dict.fromkeys(kinds.values())}

    def rows(self) -> list[Row]:
        """ablations.csv."""
        asked, found = self.plan["asked"], []
        for key in self.keys:
            arm, _, stage = key.partition(":")
            known = self.plan["stages"][key]
            for label, placement in self.placements.items():
                loss, kl = (self.values(key, label, measure) for measure in MEASURES)
                found.append(
                    Row(
                        arm, stage, label, placement, known["tokens"], known["text_tokens"],
                        known["tokens"] / known["text_tokens"], len(loss), float(loss.mean()),
                        *difference(loss, self.teacher), *mean_and_error(kl), self.plan["seconds"][key],
                        asked["model"], asked["sequence"], asked["seed"], asked["device"], asked["dtype"],
                        known["torch"], known["driver"], known["nasbench"], known["measured_utc"],
                    )
                )  # fmt: skip
        return found

    def differences(self) -> list[Difference]:
        """differences.csv; empty without the base."""
        found = []
        for key in self.keys:
            arm, _, stage = key.partition(":")
            base = f"{BASE}:{stage}"
            if arm == BASE or base not in self.keys:
                continue
            gaps = {
                label: [self.values(key, label, m) - self.values(base, label, m) for m in MEASURES]
                for label in self.placements
            }
            for filler, labels in self.fillers().items():
                gaps[MEAN + filler] = [np.mean([gaps[label][i] for label in labels], axis=0) for i in range(2)]
            for label, (loss, kl) in gaps.items():
                found.append(Difference(arm, BASE, stage, label, *mean_and_error(loss), *mean_and_error(kl), len(loss)))
        return found

    def write(self) -> str:
        """Writes ablations.csv, differences.csv and README.md, and returns the last."""
        rows, differences = self.rows(), self.differences()
        write_rows(self.out / "ablations.csv", Row, rows)
        write_rows(self.out / "differences.csv", Difference, differences)
        text = readme(self.plan, rows, differences, float(self.teacher.mean()))
        write_text(self.out / "README.md", text)
        return text


def readme(plan: Plan, rows: Sequence[Row], differences: Sequence[Difference], teacher_loss: float) -> str:
    """What came out, how much it took, both measures, and how they were made."""
    first, asked, settings = rows[0], plan["asked"], plan["asked"]["settings"]
    days = sorted({row.measured_utc[:10] for row in rows})
    versions = [f"{name} {', '.join(sorted({getattr(row, name) for row in rows}))}" for name in ("torch", "nasbench")]
    versions += [f"driver {first.driver}"] if first.driver else []
    brackets = f"; in brackets the difference to {BASE}, row by row, with its 95 % interval" if differences else ""
    lines = ["# What the attention's weights and real text are worth", ""]
    lines += [f"    {command}" for command in plan["commands"]]
    lines += [
        "",
        f"{plan['source']}, layers {', '.join(asked['names'])}, {first.device}, {first.dtype}, {', '.join(versions)}, "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}. Rows of {first.sequence} tokens, seed {first.seed}; "
        f"{settings['ridge_tokens']:,} tokens more solve the readouts. One run of each arm: errors are of the "
        "held-out text, not of the seed.",
        "",
        *(f"- {sentence}" for sentence in sentences(differences)),
        *_written(plan),
        "",
        "| arm | mixers, text | tokens | of a text of | passes | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = list({row.stage: row for row in rows if row.arm == arm}.values())
        last, seconds = mine[-1], sum(row.seconds for row in mine)
        lines.append(
            f"| {arm} | {ARMS[arm].told} | {last.tokens:,} | {last.text_tokens:,} | {last.passes:.2g} | {seconds:.0f} |"
        )
    lines += [
        "",
        f"Measured on the same {first.rows} rows of real text that nothing was trained on; the model's own loss there "
        f"is {teacher_loss:.4f}. Nats a token{brackets}.",
    ]
    for measure, title in (("kl", "KL to the model"), ("loss_above_teacher", "Loss above the model's")):
        lines += ["", f"## {title}", "", *_table(rows, differences, measure)]
    lines += ["", "Every number is a row of [ablations.csv](ablations.csv) or [differences.csv](differences.csv)."]
    return "\n".join(lines) + "\n"


def sentences(differences: Sequence[Difference]) -> list[str]:
    """What the differences say, a stage and an arm at a time."""
    told = []
    for stage, arm in dict.fromkeys((row.stage, row.arm) for row in differences):
        mine = [row for row in differences if (row.stage, row.arm) == (stage, arm)]
        means = [row for row in mine if row.label.startswith(MEAN)]
        parts = [
            f"with {mean.label.removeprefix(MEAN)} {_beside(mean, 'loss')} in loss and {_beside(mean, 'kl')} in KL"
            for mean in means
        ]
        told.append(f"{STAGES[stage]}, {arm} is, in nats a token, {'; '.join(parts)}.")
    return told


def _beside(row: Difference, measure: str) -> str:
    """An arm beside the one that it is held against, in words."""
    value, error = row.of(measure)
    if not abs(value) > Z95 * error:
        return f"not to be told apart from {row.against} ({value:+.4f} ± {Z95 * error:.4f})"
    return f"{abs(value):.4f} ± {Z95 * error:.4f} {'above' if value > 0 else 'below'} {row.against}"


def _written(plan: Plan) -> list[str]:
    """How much the model wrote and how fast."""
    written = plan["written"]
    if not written:
        return []
    seconds = plan["seconds"]["writing"]
    return [
        f"- The model wrote {written['tokens']:,} tokens, {written['documents']:,} documents, in {seconds:.0f} s: "
        f"{written['tokens'] / max(seconds, 0.01):,.0f} tokens/s."
    ]


def _table(rows: Sequence[Row], differences: Sequence[Difference], measure: str) -> list[str]:
    """One measure as Markdown: placements down, arms across."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    cells = {(row.stage, row.label, row.arm): f"{getattr(row, measure):.4f}" for row in rows}
    for gap in differences:
        value, error = gap.of("kl" if measure == "kl" else "loss")
        if (key := (gap.stage, gap.label, gap.arm)) in cells:
            cells[key] += f" ({value:+.4f} ± {Z95 * error:.4f})"
    lines = [f"| stage | placement | {' | '.join(arms)} |", "|---" * (2 + len(arms)) + "|"]
    for stage, label in dict.fromkeys((row.stage, row.label) for row in rows):
        values = " | ".join(cells.get((stage, label, arm), "") for arm in arms)
        lines.append(f"| {stage} | {label} | {values} |")
    return lines
