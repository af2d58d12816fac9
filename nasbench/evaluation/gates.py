"""Learned gates: how much full attention each layer of a supernet gets, learnt with all weights frozen.

After FlashMorph (arXiv 2606.30562), which learns gates to select layers; the form is our own. A layer with gate g gives
g * attention + (1 - g) * replacement. The gates of all layers always sum to K: a common shift of their logits sees to
that, so that only the KL from the teacher is minimised. The wanted K come one after another, the largest first, and the
gates grow harder during each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nasbench.evaluation.evaluator import Evaluator
from nasbench.spaces.placement import Placement
from nasbench.supernet.losses import distillation_kl

RATE = 0.3
"""Adam's, in logits."""
SOFT, HARD = 1.0, 0.3
"""Temperature of the gates in the first and the last step of a K."""
HALVINGS = 50
"""Of the interval that holds the shift."""

GateLoss = Callable[[Tensor, int], Tensor]
"""(gates [L], step) -> what is minimised, a scalar."""


def supernet_loss(evaluator: Evaluator, base: Placement, seed: int) -> GateLoss:
    """The KL from the teacher on fresh training text in every step, as many tokens as score a placement."""
    net, corpus = evaluator.supernet, evaluator.corpus
    teacher, rows = net.teacher, max(1, (evaluator.tokens["search"] or 0) // corpus.sequence)

    def loss(gates: Tensor, step: int) -> Tensor:
        batch = corpus.batch(step, rows, seed).to(teacher.device)
        with torch.no_grad():
            said = teacher.hidden_by_layer(batch.tokens, batch.documents)
        x, meta = teacher.begin(batch.tokens, batch.documents)
        for i, (layer, name) in enumerate(zip(teacher.layers, base, strict=True)):
            inputs = layer.input_layernorm(x)
            mixed = net.mixer(i, name)(inputs, meta)
            if i in net.space.may_be_full and not net.space.is_original(i, name):
                gate = gates[i].to(mixed)
                mixed = gate * layer.self_attn(inputs, meta) + (1 - gate) * mixed
            x = layer.finish(x, mixed, meta)
        return distillation_kl(teacher.model.norm(x), said, teacher.head_weight)

    return loss


def learn_gates(
    loss: GateLoss,
    start: Sequence[float],
    free: Sequence[int],
    counts: Sequence[int],
    steps: int,
    device: torch.device | str = "cpu",
) -> dict[int, list[float]]:
    """The gate of every layer for each number K of full-attention layers.

    Args:
        start: logit of every layer.
        free: layers that may have full attention; the others' gates are 0.
        steps: of all K together.
    """  # fmt: skip
    logits = torch.tensor(start, dtype=torch.float32, device=device, requires_grad=True)
    places = torch.tensor(sorted(free), dtype=torch.int64, device=device)
    optimizer = torch.optim.Adam([logits], lr=RATE)
    found, done = {}, 0
    for number, count in enumerate(sorted(counts, reverse=True)):
        own = steps * (number + 1) // len(counts) - done
        for step in range(own):
            optimizer.zero_grad()
            temperature = SOFT * (HARD / SOFT) ** (step / max(1, own - 1))
            loss(gates_of(logits, places, count, temperature), done + step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        done += own
        found[count] = gates_of(logits.detach(), places, count, HARD).tolist()
    return found


def gates_of(logits: Tensor, places: Tensor, count: int, temperature: float) -> Tensor:
    """Gates [L] in 0..1 that sum to `count` over the places, 0 elsewhere; the gradient knows of the common shift."""
    if not 0 < count < len(places):
        return torch.zeros_like(logits).index_fill(0, places, float(count > 0)) + 0.0 * logits
    own = logits[places] / temperature
    with torch.no_grad():
        low, high = own.min() - 20.0, own.max() + 20.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            over = (own - middle).sigmoid().sum() > count
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        slopes = (own - low).sigmoid() * (low - own).sigmoid()
        shares = slopes / slopes.sum()
    shift = low + (shares * (own - own.detach())).sum()
    return torch.zeros_like(logits).index_put((places,), (own - shift).sigmoid())
