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
from nasbench.parallel.fsdp import assign, full

ROUNDING = 1e-4
"""A share of the target's energy that is no error: bf16 rounds away about 4e-6. A window that sees the whole row is the
attention itself, and must stay so to the last bit."""


@torch.no_grad()
def calibrate(teacher: Decoder, mixers: list[dict[str, Block]], batch: Batch) -> None:
    """Gives every mixer what `Block.calibration` makes of its layer's inputs.

    The inputs have a common direction, so that a constant is nearly a linear function of them; least squares finds it.
    """
    x, meta = teacher.begin(batch.tokens, batch.documents)
    for layer, alternatives in zip(teacher.layers, mixers, strict=True):
        inputs = layer.input_layernorm(x).flatten(0, -2).double()
        gram = inputs.T @ inputs
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        constant = torch.linalg.solve(gram, inputs.sum(0))
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
) -> None:
    """Sets every mixer's output projection to the ridge solution on the teacher's activations.

    Args:
        mixers: per layer, by name.
        progress: called with the tokens so far after each batch.
    """
    sums: dict[tuple[int, str], tuple[Tensor, ...]] = {}
    done = 0
    for batch in batches:
        x, meta = teacher.begin(batch.tokens, batch.documents)
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
                old = sums.get((i, name))
                sums[i, name] = new if old is None else tuple(a.add_(b) for a, b in zip(old, new, strict=True))
            x = layer.finish(x, target, meta)
        done += batch.tokens.numel()
        progress(done)
    for (i, name), (gram, cross, energies) in sums.items():
        out = mixers[i][name].out
        assert out is not None  # there are no sums without one
        left, whole = energies.tolist()
        if left <= ROUNDING * whole:
            continue
        # float64: the features of neighbouring channels are nearly dependent.
        gram, cross = gram.double(), cross.double()
        gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
        change = torch.linalg.solve(gram, cross).T
        assign(out.weight, full(out.weight).double() + change)
