"""What of a linear mixer can be had in closed form: its readout, and a gentle start of its writing strength.

A mixer's output is a linear map (`o_proj`) of its features, so the readout that is nearest to the attention's output
on the teacher's own activations is a ridge regression: with features X [N, F], targets Y [N, C] and the present W,

    W' = W + argmin_D ||X D - (Y - X W)||^2 + lam ||D||^2,     lam = ridge * mean energy of a feature * N.

One pass over some thousands of tokens does what thousands of gradient steps on the readout would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nasbench.data.packing import Batch
from nasbench.model.block import Chunk, TokenMixer
from nasbench.model.decoder import Decoder
from nasbench.parallel.fsdp import assign, full
from nasbench.supernet.forward import chunk_of
from nasbench.supernet.fused_layers import embed, finish_layer, mix, run_layer

ROUNDING = 1e-4
"""A share of the target's energy that is no error: bf16 rounds away about 4e-6. A window that sees the whole row is the
attention itself, and must stay so to the last bit."""
WRITING_LOGIT = -2.0
"""Where the logit of the writing strength starts. Softmax attention averages over many tokens; at the strength of 1/2
that a random projection gives, the delta rule soon overwrites what like keys wrote. On SmolLM2-135M with readouts
solved, the error over layers was 0.417 with random logits, and 0.397, 0.387, 0.390, 0.406 at -1, -2, -3, -4."""


@torch.no_grad()
def calibrate_writing(
    teacher: Decoder, mixers: list[dict[str, TokenMixer]], batch: Batch, logit: float = WRITING_LOGIT
) -> None:
    """Sets every mixer's `b_proj`, which has no bias, so that its output is about `logit` on the layer's inputs.

    The inputs have a common direction, so that a constant is a linear function of them, nearly; it is found by least
    squares. Kinds without a `b_proj` of this form are left alone.
    """
    x, chunk = embed(teacher, batch.tokens), chunk_of(teacher, batch)
    for layer, alternatives in zip(teacher.layers, mixers, strict=True):
        inputs = layer.attention_input(x).flatten(0, -2).double()
        gram = inputs.T @ inputs
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        constant = torch.linalg.solve(gram, inputs.sum(0))
        for mixer in alternatives.values():
            projection = getattr(mixer, "b_proj", None)
            if isinstance(projection, nn.Linear) and projection.bias is None:
                assign(projection.weight, (logit * constant).expand(projection.weight.shape))
        x = run_layer(layer, x, chunk)


def readout(mixer: TokenMixer) -> nn.Linear | None:
    """The mixer's output projection, None for a kind that has none by this name."""
    projection = getattr(mixer, "o_proj", None)
    return projection if isinstance(projection, nn.Linear) and projection.bias is None else None


@torch.no_grad()
def features(mixer: TokenMixer, x: Tensor, chunk: Chunk) -> Tensor:
    """What the mixer's readout sees, [B * T, F] fp32: caught on its way into `o_proj`."""
    caught: list[Tensor] = []
    projection = readout(mixer)
    assert projection is not None
    handle = projection.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        mix(mixer, x, chunk)
    finally:
        handle.remove()
    return caught[0].flatten(0, -2).float()


@torch.no_grad()
def solve_readouts(
    teacher: Decoder,
    mixers: list[dict[str, TokenMixer]],
    batches: Iterable[Batch],
    ridge: float,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Sets every mixer's `o_proj` to the ridge solution on the teacher's activations.

    Args:
        mixers: per layer, by name.
        batches: on the teacher's device.
        progress: called with the tokens of each batch.
    """
    sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    energies: dict[tuple[int, str], Tensor] = {}
    for batch in batches:
        x, chunk = embed(teacher, batch.tokens), chunk_of(teacher, batch)
        for i, layer in enumerate(teacher.layers):
            inputs = layer.attention_input(x)
            target = mix(layer.self_attn, inputs, chunk)
            for name, mixer in mixers[i].items():
                projection = readout(mixer)
                if projection is None:
                    continue
                seen = features(mixer, inputs, chunk)
                error = target.flatten(0, -2).float() - seen @ full(projection.weight).float().T
                both = torch.stack((error.square().sum(), target.float().square().sum()))
                energies[i, name] = energies[i, name] + both if (i, name) in energies else both
                gram, cross = seen.T @ seen, seen.T @ error
                old = sums.get((i, name))
                sums[i, name] = (gram, cross) if old is None else (old[0].add_(gram), old[1].add_(cross))
            x = finish_layer(layer, x, target)
        progress(batch.tokens.numel())
    for (i, name), (gram, cross) in sums.items():
        projection = readout(mixers[i][name])
        assert projection is not None
        left, whole = energies[i, name].tolist()
        if left <= ROUNDING * whole:
            continue
        # float64: the features of neighbouring channels are nearly dependent.
        gram, cross = gram.double(), cross.double()
        gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
        change = torch.linalg.solve(gram, cross).T
        assign(projection.weight, full(projection.weight).double() + change)
