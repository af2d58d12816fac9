"""The tables of the front, of predicted beside measured speeds, of what is missing, and of where numbers come from."""

from __future__ import annotations

import math

from nasbench.core.sizes import format_size
from nasbench.report.facts import Facts
from nasbench.report.sections import Cell, Section
from nasbench.report.targets import TargetFacts, recommended, target_words
from nasbench.report.verdict import plus_minus


def number(value: float | None, form: str = ",.4f") -> str:
    """A formatted number with a real minus sign; "" where it is not known."""
    return "" if value is None or math.isnan(value) else format(value, form).replace("-", "−")


def speed(value: float) -> str:
    """Tokens/s in three to four digits."""
    return number(value, ",.0f" if abs(value) >= 1000 else ",.1f")


def front_table(target: TargetFacts, number_of: int) -> Section:
    """The front, the most accurate placement first."""
    rows = []
    for point in target.points:
        row = point.row
        loss = [Cell(f"{number(row.loss)} ± {number(row.loss_stderr)}"), Cell(number(point.delta, "+.4f"))]
        other = Cell(plus_minus(point.test) if point.test.n else "")
        score = [] if target.by_loss else [Cell(number(row.front_score))]
        rows.append(
            [
                Cell(str(row.rank)),
                Cell(row.placement + (" (scores as the model)" if point.identical else ""), placement=row.layers),
                Cell(str(row.k)), *score, *loss, other,
                Cell(speed(row.decode_tok_s), estimated=point.estimated), Cell(speed(point.measured_tok_s), sure=True),
                Cell(f"{number(point.speedup, '.2f')}× {point.basis}", estimated=point.basis == "estimated"),
                Cell(number(row.cache_bytes / 2**20, ",.1f")),
            ]
        )  # fmt: skip
    head = ["#", "placement", "K", *([] if target.by_loss else ["score"]), "loss ± std. error", "above the model"]
    head += ["above it on other text", "predicted tok/s", "measured tok/s", "speed-up", "cache MiB"]
    words = (
        "Loss: nats a token, with the standard error over the held-out sequences. All placements see the same "
        "sequences, so that differences between them are surer than that. Other text: text that no search saw, ± half "
        "of a 95 % interval, item by item. Predicted: the cost model, from layer times. Measured: the whole model, end "
        "to end. The speed-up compares measured with measured, or predicted with predicted. "
        f"All speeds: {target_words(target.target)}."
    )
    suffix = f"-{number_of}" if number_of > 1 else ""
    return Section(f"front{suffix}", "All placements of the front", words, head, rows)


def validation_table(facts: Facts) -> Section:
    """Predicted beside measured speeds."""
    rows = [
        [Cell(row.placement, placement=row.layers), Cell(format_size(row.context)), Cell(str(row.batch)),
         Cell(speed(row.predicted_tok_s), estimated=row.source == "estimated"), Cell(speed(row.measured_tok_s)),
         Cell(f"{number(100 * row.error, '+.1f')} %"), Cell(row.device), Cell(row.measured_utc[:10])]
        for row in facts.validation
    ]  # fmt: skip
    head = ["placement", "context", "batch", "predicted tok/s", "measured tok/s", "error", "device", "date"]
    return Section("predicted-against-measured", "All measured placements", "", head, rows, lines=0)


def target_table(facts: Facts) -> Section:
    """What is recommended on each device, context and batch that was searched."""
    rows = []
    for target in facts.targets if len(facts.targets) > 1 else []:
        if (best := recommended(target)) is not None:
            rows.append(
                [Cell(target_words(target.target)), Cell(best.row.placement, placement=best.row.layers),
                 Cell(str(best.row.k)), Cell(number(best.delta, "+.4f")),
                 Cell(f"{speed(best.tok_s)} {best.basis}", estimated=best.basis == "estimated"),
                 Cell(f"{number(best.speedup, '.2f')}×")]
            )  # fmt: skip
    head = ["target", "recommended placement", "K", "loss above the model", "tok/s", "speed-up"]
    return Section("targets", "Devices and loads side by side", "", head, rows)


def missing_table(facts: Facts) -> Section:
    """What the run has no file for."""
    rows = [[Cell(part.what), Cell(part.command, code=True)] for part in facts.missing]
    return Section("missing", "Not measured yet", "", ["part", "command that makes it"], rows)


def source_table(facts: Facts) -> Section:
    """Files, devices, dates, versions and hashes."""
    head = ["numbers", "file", "device", "measured", "versions", "basis", "SHA-256, first digits"]
    rows = [
        [Cell(each.numbers), Cell(each.file, code=True), Cell(each.device), Cell(each.dates), Cell(each.versions),
         Cell(each.note), Cell(each.sha256, code=True)]
        for each in facts.sources
    ]  # fmt: skip
    return Section("sources", "Where the numbers come from", "", head, rows)
