"""Closed-form initialisation of a linear mixer: the output projection by ridge regression, and calibrated gates.

A mixer's output is a linear map of its features, so the output projection that is nearest to the attention's output
on the teacher's own activations is a ridge regression: with features X [N, F], targets Y [N, C] and the present W,

    W' = W + argmin_D ||X D - (Y - X W)||^2 + lam ||D||^2,     lam = ridge * mean energy of a feature * N.

One pass over some thousands of tokens does what thousands of gradient steps on the projection would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nasbench.data.packing import Batch
from nasbench.model.block import Block, features_of, with_weights
from nasbench.model.decoder import Decoder
from nasbench.parallel.context import SINGLE, DistContext
from nasbench.parallel.fsdp import assign, full

ROUNDING = 1e-4
"""A share of the target's energy that is no error: bf16 rounds away about 4e-6. A window that sees the whole row is the
attention itself, and must stay so to the last bit."""


@torch.no_grad()
def calibrate(teacher: Decoder, mixers: list[dict[str, Block]], batch: Batch, workers: DistContext = SINGLE) -> None:
    """Gives every mixer what `Block.calibration` makes of its layer's inputs.

    The inputs have a common direction, so that a constant is nearly a linear function of them; least squares finds it.
    """
    own, counts = workers.some_rows(batch)
    x, meta = teacher.begin(own.tokens, own.documents)
    for layer, alternatives in zip(teacher.layers, mixers, strict=True):
        inputs = layer.input_layernorm(x).flatten(0, -2).double() * counts
        gram, total = inputs.T @ inputs, inputs.sum(0)
        workers.all_reduce([gram, total])
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        constant = torch.linalg.solve(gram, total)
        for mixer in alternatives.values():
            for name, value in mixer.calibration(constant).items():
                assign(mixer.get_parameter(name), value)
        x = layer(x, meta)


def out_name(mixer: Block) -> str:
    """The name of the output projection's weight among the mixer's parameters, "" where it has none."""
    out = mixer.out
    return next((name for name, p in mixer.named_parameters() if out is not None and p is out.weight), "")


@torch.no_grad()
def solve_output_projections(
    teacher: Decoder,
    mixers: list[dict[str, Block]],
    batches: Iterable[Batch],
    ridge: float,
    progress: Callable[[int], None] = lambda tokens: None,
    workers: DistContext = SINGLE,
) -> None:
    """Sets every mixer's output projection to the ridge solution on the teacher's activations. Several processes share
    the rows of every batch, and then the projections.

    Args:
        mixers: per layer, by name.
        progress: called with the tokens so far after each batch.
    """
    sums: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}
    done = 0
    for batch in batches:
        own, counts = workers.some_rows(batch)
        x, meta = teacher.begin(own.tokens, own.documents)
        for i, layer in enumerate(teacher.layers):
            inputs = layer.input_layernorm(x)
            target = layer.self_attn(inputs, meta)
            for name, mixer in mixers[i].items():
                projection = mixer.out
                if projection is None or projection.bias is not None:
                    continue
                seen = with_weights(mixer, features_of, inputs, meta).flatten(0, -2).float()
                error = target.flatten(0, -2).float() - seen @ full(projection.weight).float().T
                energies = torch.stack((error.square().sum(), target.float().square().sum()))
                new = (seen.T @ seen, seen.T @ error, energies)
                old = sums.setdefault((i, name), new)
                for part, more in zip(old, new, strict=True):
                    if not counts:
                        more.zero_()
                    if old is not new:
                        part.add_(more)
            x = layer.finish(x, target, meta)
        done += batch.tokens.numel()
        progress(done)
    left = list(sums)
    while left:
        # Each process solves one of the next few projections.
        few, left = left[: workers.size], left[workers.size :]
        solved: list[tuple[Tensor, Tensor]] = []
        for number, (i, name) in enumerate(few):
            parts = sums.pop((i, name))
            workers.all_reduce(list(parts))
            out = mixers[i][name].out
            assert out is not None  # there are no sums without one
            weight = full(out.weight).clone()
            if number == workers.rank:
                weight += _change(*parts, ridge)
            solved.append((out.weight, weight))
        for number, (parameter, weight) in enumerate(solved):
            workers.broadcast([weight], number)
            assign(parameter, weight)


def _change(gram: Tensor, cross: Tensor, energies: Tensor, ridge: float) -> Tensor | float:
    """What the ridge solution adds to a projection, [C, F] fp64; 0.0 where it has no error to speak of.

    Args:
        gram: X^T X, [F, F]; cross: X^T (Y - X W), [F, C]; energies: [2], of Y - X W and of Y.
    """
    error, whole = energies.tolist()
    if error <= ROUNDING * whole:
        return 0.0
    # float64: the features of neighbouring channels are nearly dependent.
    gram, cross = gram.double(), cross.double()
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    return torch.linalg.solve(gram, cross).T
