"""Layers that placements share are computed once: the same scores to the bit, and a fraction of the work."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from search.synthetic import SyntheticObjective, search
from supernet_tiny import make_run, one_thread, save_supernet, text_file, tiny_model

from nasbench.checkpoints.load import load_model
from nasbench.evaluation.evaluator import Evaluator
from nasbench.evaluation.shared_layers import SharedLayers
from nasbench.search.session import run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.spaces.placement import parse_placement
from nasbench.supernet.supernet import Supernet

__all__ = ["make_run", "one_thread", "text_file", "tiny_model"]
LAYERS = 30


class Counted(SyntheticObjective):
    """Every evaluation passes through layers that do nothing."""

    def __init__(self, room_bytes):
        super().__init__(LAYERS)
        teacher = SimpleNamespace(
            model=SimpleNamespace(norm=lambda x: x),
            begin=lambda tokens, documents: (torch.zeros(1, 1, 1), SimpleNamespace(carried={})),
        )
        layer = lambda i, name: lambda x, meta: x + 1  # noqa: E731
        self.layers = SharedLayers(SimpleNamespace(teacher=teacher, layer=layer), room_bytes)

    def measure(self, placements):
        fresh = sorted(p for p in placements if self.store.get(self.key(p, "kl")) is None)
        batch, reading = SimpleNamespace(tokens=None, documents=None), SimpleNamespace(kernels=nullcontext)
        for placement, hidden in self.layers.hidden(fresh, "text", batch, reading):
            assert hidden.item() == len(placement)
        return super().measure(placements)


def test_a_beam_of_thirty_layers_computes_half_of_them_at_most(tmp_path):
    """The ranking is that of a search that shares nothing; so are the placements that it tries."""
    assert "beam" in STRATEGIES
    options = {"full_attention": (2, 4, 8), "evaluations": 160}
    found = []
    for name, objective in (
        ("shared", Counted(4 * 480)), ("little room", Counted(0)), ("alone", SyntheticObjective(LAYERS))
    ):  # fmt: skip
        run = search(tmp_path / name, objective, **options)
        run_search(run, "beam")
        found.append((objective, [(trial.placement, trial.score) for trial in run.trials()]))
    (shared, ranking), (little, same), (_, alone) = found
    assert ranking == same == alone
    assert shared.layers.asked == little.layers.asked == LAYERS * len(set(shared.asked))
    assert 2.4 * shared.layers.computed < shared.layers.asked
    assert shared.layers.computed < little.layers.computed < little.layers.asked


def test_layers_shared_between_calls_give_the_same_scores(make_run):
    run = make_run(names=("A", "W8", "J"))
    save_supernet(Supernet(load_model(run.spec.model), run.spec.space), run.supernet)
    placements = [parse_placement(text) for text in ("A J 2A", "A J W8 A", "A J W8 J", "2J 2A", "4W8", "A 3J")]

    def samples(room_bytes, groups):
        (run.scores / "samples.jsonl").unlink(missing_ok=True)
        evaluator = Evaluator.open(run, dtype=torch.float32, search_tokens=128)
        evaluator.layers = SharedLayers(evaluator.supernet, room_bytes)
        rows = [row for group in groups for row in evaluator.measure(group)]
        return [{task: one.samples.tolist() for task, one in row.items()} for row in rows]

    assert samples(None, [[placement] for placement in placements]) == samples(0, [placements])
