"""A search that minds retrieval: which layers keep full attention, by what both text and answers lose.

Held-out text hardly tells whether a model still finds a number that stood two thousand tokens before (the loss of
SmolLM2-135M in windows with four layers of attention is the model's own, its retrieval a quarter). So the greedy
selection of nasbench.search.greedy is run once more on the sum of two divergences from the model, on text and on the
answers to key-value questions, each as a share of what it is without any full attention. For the numbers of layers that
are finalised, the best of all searches is then improved by moving one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nasbench.evaluation.reading import Text
from nasbench.evaluation.retrieval import make_items
from nasbench.spaces.placement import Placement

if TYPE_CHECKING:
    from nasbench.evaluation.evaluator import Evaluator
    from nasbench.search.session import Search

METHOD = "recall"
ITEMS = {"cpu": 4, "cuda": 64}
"""Questions, by the kind of the device. With 24 a search on a GPU once chose layers that lose benchmarks."""


class Recall:
    """Scores placements on the search split's text and on questions over it, others than a report's.

    Args:
        length: tokens of a question with the text before it.
        base: the placement without full attention that both divergences are shares of.
    """

    def __init__(self, evaluator: Evaluator, length: int, base: Placement, seed: int = 0) -> None:
        self.evaluator, self.base = evaluator, base
        count = ITEMS[evaluator.supernet.teacher.device.type]
        items = make_items(evaluator.context("search"), length, count, seed=seed + 1)
        self.texts = [Text(item.prompt + item.answer, len(item.answer)) for item in items]
        self.tokens = sum(len(text.ids) for text in self.texts)
        self._whole = self.parts([base])[0]

    def parts(self, placements: Sequence[Placement]) -> list[tuple[float, float]]:
        """Divergence from the model in nats a token, on text and on answers, of each placement in order."""
        on_text = self.evaluator.divergences(placements, "search")
        on_answers = self.evaluator.divergences_at_ends(placements, self.texts)
        return [(score.value, float(on_answers[p].mean())) for p, score in zip(placements, on_text, strict=True)]

    def shares(self, placements: Iterable[Placement]) -> dict[Placement, tuple[float, float]]:
        """Divergence on text and on answers as shares of what they are without full attention."""
        wanted = list(dict.fromkeys(placements))
        whole = [max(value, 1e-9) for value in self._whole]
        return {p: (a / whole[0], b / whole[1]) for p, (a, b) in zip(wanted, self.parts(wanted), strict=True)}

    def scores(self, placements: Iterable[Placement]) -> dict[Placement, float]:
        """The sum of the two shares: 2 without full attention, 0 for the model itself."""
        return {placement: sum(shares) for placement, shares in self.shares(placements).items()}


def recall_greedy(search: Search, recall: Recall, counts: Sequence[int], evaluations: int) -> dict[int, Placement]:
    """The placement of each K in `counts`: from no full attention on, the layer that lowers the score the most is
    restored, one after another; of as many layers a level as `evaluations` allow, those first that do most alone.

    At least one layer is tried at each level, and all at the first.
    """
    layers, found = search.space.num_layers, {}
    chosen: frozenset[int] = frozenset()
    order = list(range(layers))
    left = evaluations
    for level in range(1, max(counts, default=0) + 1):
        allowance = layers if level == 1 else max(1, left // (max(counts) - level + 1))
        free = [layer for layer in order if layer not in chosen][:allowance]
        sets = {search.with_full(chosen | {layer}): layer for layer in free}
        scores = recall.scores(sets)
        ranked = sorted(sets, key=lambda placement: (scores[placement], placement))
        left -= len(sets)
        search.progress(METHOD, level, max(counts))
        if level == 1:
            order = [sets[placement] for placement in ranked]
        chosen |= {sets[ranked[0]]}
        if level in counts:
            found[level] = ranked[0]
    return found


def exchange(search: Search, recall: Recall, starts: Sequence[Placement], evaluations: int) -> Placement:
    """The best of `starts`, all of as many layers of full attention, improved: one of these layers after another moves
    to where the score is the lowest, if that is not where it is, until a round changes nothing or the evaluations are
    used up."""
    scores = recall.scores(starts)
    left = evaluations - len(scores)
    best = min(scores, key=lambda placement: (scores[placement], placement))
    changed = True
    while changed:
        changed = False
        for layer in _full(best):
            if left <= 0:
                return best
            others = frozenset(_full(best)) - {layer}
            # The nearest first, where not all can be tried.
            free = sorted(set(range(search.space.num_layers)) - {layer, *others}, key=lambda i: (abs(i - layer), i))
            moved = [search.with_full(others | {i}) for i in free[:left]]
            left -= len(moved)
            found = recall.scores(moved)
            found[best] = scores[best]
            first = min(found, key=lambda placement: (found[placement], placement))
            changed |= first != best
            scores[first], best = found[first], first
    return best


def _full(placement: Placement) -> list[int]:
    return [i for i, name in enumerate(placement) if name == "A"]
