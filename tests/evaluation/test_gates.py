"""Learned gates: they sum to K, their loss at hard gates is the placement's own KL, and they find what matters."""

import pytest
import torch
from supernet_tiny import make_run, one_thread, save_supernet, text_file, tiny_model

from nasbench.checkpoints.load import load_model
from nasbench.evaluation.evaluator import Evaluator
from nasbench.evaluation.gates import gates_of, learn_gates, supernet_loss
from nasbench.spaces.placement import parse_placement
from nasbench.supernet.supernet import Supernet

__all__ = ["make_run", "one_thread", "text_file", "tiny_model"]


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_gates_sum_to_k_and_know_of_their_shift(count):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    places = torch.tensor([0, 2, 3, 4])
    found = gates_of(logits, places, count, 0.5)
    assert found.sum().item() == pytest.approx(count)
    assert found[1] == 0
    weights = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    for i, step in enumerate(torch.eye(5, dtype=torch.float64) * 1e-5):
        ahead, behind = ((gates_of(logits.detach() + s * step, places, count, 0.5) * weights).sum() for s in (1, -1))
        assert gradient[i].item() == pytest.approx(((ahead - behind) / 2e-5).item(), abs=1e-5)


def test_hard_gates_are_the_placement(make_run):
    run = make_run(names=("A", "W8", "J"))
    net = Supernet(load_model(run.spec.model), run.spec.space)
    save_supernet(net, run.supernet)
    evaluator = Evaluator.open(run, dtype=torch.float32, search_tokens=128)
    loss = supernet_loss(evaluator, parse_placement("J W8 2J"), seed=0)
    assert loss(torch.ones(4), 0).item() == pytest.approx(0.0, abs=1e-5)
    batch, teacher = evaluator.corpus.batch(0, 4, 0), evaluator.supernet.teacher
    decoder = evaluator.supernet.select(parse_placement("J A J A"))
    with torch.no_grad():
        log_p, log_q = (
            model.logits(model.hidden_by_layer(batch.tokens, batch.documents)).log_softmax(-1)
            for model in (teacher, decoder)
        )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert loss(torch.tensor([0.0, 1.0, 0.0, 1.0]), 0).item() == pytest.approx(kl.item(), rel=1e-4)


def test_gates_find_the_layers_that_matter():
    costs = torch.tensor([1.0, 5.0, 0.5, 4.0, 3.0, 0.1])
    found = learn_gates(lambda gates, step: ((1 - gates) * costs).sum(), [0.0] * 6, range(5), (1, 3), 40)
    order = sorted(range(6), key=lambda layer: -found[3][layer])
    assert set(order[:3]) == {1, 3, 4}
    assert max(range(6), key=lambda layer: found[1][layer]) == 1
    assert sum(found[1]) == pytest.approx(1.0, abs=1e-4)
    assert all(gates[5] == 0 for gates in found.values())
