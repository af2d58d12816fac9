"""The page of benchmarks/strategies.py: the rows of its CSV files, its tables and its figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nasbench.core.tables import read_table


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One strategy over its seeds: a row of summary.csv.

    Attributes:
        equal: what all strategies had the same of: evaluations or seconds.
        evaluations, seconds, tokens: means; seconds of scores and of the strategy itself, tokens that were scored.
        hypervolume: of KL against decode tokens/s on the test split, as a share of the box between the model itself and
            the best placement without full attention; 95 % interval over the rows of text, then the seeds' range.
        above_even: the hypervolume minus that of the evenly spread placements, with the interval of the difference.
        note: what went wrong.
    """

    equal: str
    strategy: str
    seeds: int
    evaluations: float
    seconds: float
    tokens: float
    hypervolume: float
    low: float
    high: float
    least_seed: float
    most_seed: float
    above_even: float
    above_low: float
    above_high: float
    note: str
    device: str
    torch: str
    driver: str
    project: str
    measured_utc: str


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best placement of K full-attention layers that one search found: a row of scores.csv. KL in nats a token."""

    equal: str
    strategy: str
    seed: int
    k: int
    placement: str
    kl_search: float
    kl_test: float
    kl_test_stderr: float
    decode_tok_s: float


def tables(summaries: Sequence[Summary], scores: Sequence[Best]) -> list[str]:
    """Lines of Markdown."""
    counts = sorted({row.k for row in scores})
    lines = []
    for equal in dict.fromkeys(row.equal for row in summaries):
        head = ["strategy", "seeds", "evaluations", "seconds", "tokens", "hypervolume (95 % interval)", "seeds' range"]
        head += ["above evenly spread (95 % interval)", *(f"KL, K {k}" for k in counts), "note"]
        lines += ["", f"## At equal {equal}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in (row for row in summaries if row.equal == equal):
            mine = [best for best in scores if (best.equal, best.strategy) == (equal, row.strategy)]
            kls = {k: [best.kl_test for best in mine if best.k == k] for k in counts}
            cells = [
                row.strategy, str(row.seeds), f"{row.evaluations:.0f}", f"{row.seconds:.2f}", f"{row.tokens:,.0f}",
                f"{row.hypervolume:.4f} ({row.low:.4f} to {row.high:.4f})",
                f"{row.least_seed:.4f} to {row.most_seed:.4f}",
                f"{row.above_even:+.4f} ({row.above_low:+.4f} to {row.above_high:+.4f})",
                *(f"{statistics.mean(kl):.4f}" if kl else "" for kl in kls.values()), row.note,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(folder: Path) -> None:
    """The page's tables anew and the figure, from the CSV files of a folder."""
    from matplotlib.figure import Figure

    summaries, scores = read_table(folder / "summary.csv", Summary), read_table(folder / "scores.csv", Best)
    page = folder / "README.md"
    head = page.read_text(encoding="utf-8").partition("\n## ")[0].rstrip()
    page.write_text("\n".join([head, *tables(summaries, scores)]) + "\n", encoding="utf-8")
    ways = list(dict.fromkeys(row.equal for row in summaries))
    figure = Figure(figsize=(4.5 * len(ways), 4.0), layout="constrained")
    for axes, equal in zip(np.ravel(figure.subplots(1, len(ways), sharex=True)), ways, strict=True):
        rows = [row for row in reversed(summaries) if row.equal == equal and row.hypervolume > 0]
        middle = [row.hypervolume for row in rows]
        errors = [[row.hypervolume - row.low for row in rows], [row.high - row.hypervolume for row in rows]]
        axes.errorbar(middle, [row.strategy for row in rows], xerr=errors, fmt="o", color="#0072b2", capsize=2)
        axes.set(title=f"equal {equal}", xlabel="hypervolume, share of the box")
        axes.grid(axis="x", color="#e2e5ea")
    figure.savefig(folder / "hypervolume.png", dpi=160)
