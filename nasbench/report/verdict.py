"""What the report says on top: which placement to take, why, at which price, and the commands for it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from nasbench.core.sizes import format_size
from nasbench.evaluation.scores import Z95, Gap
from nasbench.report.comparison import length_of
from nasbench.report.facts import Facts
from nasbench.report.targets import SHARE, TOLERANCE, Point, choices, recommended
from nasbench.search.compared import FINAL, Compared
from nasbench.spaces.space import is_full


@dataclass(frozen=True)
class Verdict:
    """A recommendation within one budget.

    Attributes:
        budget: what the placement may cost, in words.
        sentences: take it, because, at this price.
        commands: that finalise and export it.
        cautions: what a reader must know before acting on it.
    """

    point: Point
    budget: str
    sentences: tuple[str, str, str]
    commands: tuple[str, ...]
    cautions: tuple[str, ...]


def verdicts(facts: Facts) -> tuple[list[Verdict], int]:
    """(one for every hybrid of the main front, from the most accurate to the fastest; the recommended one's index)."""
    if facts.main is None or not (points := choices(facts.main)):
        return [], 0
    best = recommended(facts.main)
    return [_verdict(facts, point) for point in points], next(i for i, p in enumerate(points) if p is best)


def _verdict(facts: Facts, point: Point) -> Verdict:
    target = facts.main
    assert target is not None
    row, layers = point.row, point.row.layers
    others = [f"{layers.count(name)} become {facts.title(name)}" for name in dict.fromkeys(layers) if not is_full(name)]
    take = f"Take {row.placement}: {row.k} of {len(layers)} layers keep full attention, {listed(others)}."
    because = (
        f"None of the {len(target.trials):,} placements tried is both faster and more accurate: it decodes "
        f"{point.tok_s:,.{0 if point.tok_s >= 1000 else 1}f} tokens/s, {point.speedup:.2f} × the model itself "
        f"({point.basis}), on {row.device} at context {format_size(row.context)}, batch {row.batch}."
    )
    folder, final = str(facts.run.path), _finalised(facts, point)
    placed = f"--placement {shlex.quote(row.placement)}"
    name = shlex.quote(folder)
    if row.limits and row.excess == 0:
        because += f" It keeps to {row.limits}."
    commands = [] if final else [f"nasbench finalize {name} {placed} --tokens 1M"]
    commands.append(f"nasbench export {name} {placed} --out {shlex.quote(f'{folder}-k{row.k}')}")
    return Verdict(point, _budget(facts, point), (take, because, _price(facts, point, final)), tuple(commands),
                   tuple(_cautions(facts, point)))  # fmt: skip


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def perplexity(nats: float) -> str:
    """`+6.8 % perplexity` of a difference of losses."""
    return f"{math.expm1(nats):+.1%} perplexity".replace("%", " %")


def _budget(facts: Facts, point: Point) -> str:
    if facts.main and facts.main.by_loss:
        return f"{point.price:+.3f} nats a token ({perplexity(point.price)})"
    return f"{point.price:+.3f} of {point.row.objective}"


def _finalised(facts: Facts, point: Point) -> Compared | None:
    rows = [r for r in facts.comparison.rows if r.weights.startswith(FINAL) and r.text == point.row.placement]
    return rows[0] if rows else None


def _price(facts: Facts, point: Point, final: Compared | None) -> str:
    compared, row = facts.comparison, point.row
    words = [f"{gap_words(point.test)} on text that no search saw" if point.test.n else gap_words(_searched(point))]
    if facts.main and not facts.main.by_loss:
        words.insert(0, f"{point.price:+.3f} of {row.objective}")
    if final:
        words.append(f"{gap_words(compared.gap(final))} once finalised")
    task = compared.common_retrieval()
    ours = final or next((each for each in compared.rows if each.text == row.placement), None)
    theirs, mine = compared.scores(compared.teacher, task), compared.scores(ours, task)
    if mine and theirs and theirs.value:
        words.append(f"{mine.value / theirs.value:.0%} of the retrieval at {format_size(length_of(task))}")
    cache = f"{row.cache_bytes / 2**20:,.0f} MiB of cache"
    if facts.main and facts.main.full:
        cache += f" instead of {facts.main.full.cache_bytes / 2**20:,.0f}"
    return f"The price: {'; '.join(words)}; {cache}."


def _searched(point: Point) -> Gap:
    return Gap(point.delta, math.nan, 0)


def plus_minus(gap: Gap) -> str:
    """`+0.0654 ± 0.0123`: half of a 95 % interval behind the mean, where it is known."""
    width = "" if math.isnan(gap.stderr) else f" ± {Z95 * gap.stderr:.4f}"
    return f"{gap.mean:+.4f}{width}".replace("-", "−")


def gap_words(gap: Gap) -> str:
    """`+0.0654 ± 0.0123 nats a token (+6.8 % perplexity)`."""
    where = "" if gap.n else " on the text of the search"
    return f"{plus_minus(gap)} nats a token ({perplexity(gap.mean)}){where}"


def _cautions(facts: Facts, point: Point) -> list[str]:
    target, row = facts.main, point.row
    assert target is not None
    found = []
    if target.by_loss and point.price > math.log1p(TOLERANCE):
        found.append(
            f"It costs more than {TOLERANCE * 100:.0f} % of perplexity. More training tokens, or more layers of full "
            "attention, bring it closer to the model."
        )
    if not target.by_loss:
        found.append(
            "The search minimised a mix of tasks, and the budget is in its units. The default is "
            f"{SHARE * 100:.0f} % of what the fastest placement costs."
        )
    if row.limits and row.excess != 0:
        how = "whether it does is not known" if math.isnan(row.excess) else f"it is {row.excess:.1%} beyond them"
        found.append(f"No hybrid of the front is known to keep to {row.limits}: {how}.")
    if facts.cost and facts.cost.cache(row.layers, row.context, row.batch).fits is False:
        found.append(f"It does not fit in the memory of {row.device} at this context and batch.")
    if point.basis != "measured":
        source = "another device's layer times" if point.estimated else "layer times"
        found.append(
            f"Its speed is predicted from {source}. Measure it: nasbench validate {shlex.quote(str(facts.run.path))}"
        )
    if target.identical:
        found.append(
            f"{len(target.identical)} placements score exactly as the model does, and are left out: the search text is "
            "too short to tell windows from full attention. Search with longer rows."
        )
    return found
