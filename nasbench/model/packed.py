"""Several projections of one input as one matrix product, without changing parameter names or doubling memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIGNED = 16
"""Outputs of a product come in multiples of it: rows of other lengths are slow to write and to read."""


class PackedProjections:
    """Several projections of one input side by side: x [..., C] -> a row [..., P] that holds all of their outputs.

    The first product without gradients moves the weights into one matrix and makes every parameter a view of its rows:
    state dictionaries, optimisers and in-place updates see what they saw before. When a parameter has been replaced
    since (moved to a device, cast, loaded by assignment), they are packed again. A decode step is a row of small
    products, and each costs more to start (a kernel launch, a oneDNN primitive) than to compute.

    A plain object, not a module: it owns no parameters. The projections all have a bias, or none has.

    Attributes:
        sizes: outputs of each projection.
        padded: zeros follow in rows of inference, up to a multiple of ALIGNED.
        unpacked: the parameters must stay where they are, as FSDP2's do.
    """

    unpacked = False

    def __init__(self, linears: Sequence[nn.Linear], padded: bool = False) -> None:
        self.linears, self.padded = tuple(linears), padded
        self.sizes = [linear.out_features for linear in self.linears]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """The outputs one by one: one product where nothing needs a gradient, else one each."""
        if self.unpacked or torch.is_grad_enabled():
            return [linear(x) for linear in self.linears]
        return self.split(F.linear(x, *self.weight_and_bias()))

    def __call__(self, x: Tensor) -> Any:
        """The row, by as many products as `parts` takes. Several products stay the tuple of their outputs: joining them
        would only cost a copy, and a core that reads them by `split` cannot tell."""
        if not (self.unpacked or torch.is_grad_enabled()):
            return F.linear(x, *self.weight_and_bias())
        parts = self.parts(x)
        return parts[0] if len(parts) == 1 else tuple(parts)

    def split(self, row: Tensor | tuple[Tensor, ...]) -> Sequence[Tensor]:
        """A row [..., at least P] as the outputs of each projection."""
        return row if isinstance(row, tuple) else row[..., : sum(self.sizes)].split(self.sizes, dim=-1)

    def aligned(self, x: Tensor) -> Tensor:
        """The row by one product with one gradient, zeros up to a multiple of ALIGNED behind it where it learns."""
        if self.unpacked:
            # A product of a matrix made here would keep it until the backward pass.
            return torch.cat(tuple(self.parts(x)), -1)
        learns = any(linear.weight.requires_grad for linear in self.linears)
        if not (learns and torch.is_grad_enabled()):
            return F.linear(x, *self.weight_and_bias())
        weights, biases = self._parameters()
        missing = -sum(self.sizes) % ALIGNED
        weights.append(weights[0].new_zeros(missing, x.shape[-1]))
        if not biases:
            return F.linear(x, torch.cat(weights))
        return F.linear(x, torch.cat(weights), torch.cat([*biases, weights[0].new_zeros(missing)]))

    def _parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        weights: list[Tensor] = [linear.weight for linear in self.linears]
        return weights, [linear.bias for linear in self.linears if linear.bias is not None]

    def unpack(self) -> None:
        """Gives every parameter that lies in one matrix with others its own memory again, and leaves it there."""
        self.unpacked = True
        self.weight = self.bias = None
        for linear in self.linears:
            for parameter in linear.parameters():
                parameter.data = parameter.data.clone()

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The one weight [P, C] and bias [P]. The parameters are views of them from now on, unless unpacked."""
        weights, biases = self._parameters()
        if self.unpacked:
            return torch.cat(weights), torch.cat(biases) if biases else None
        self.weight = packed_parameters(self.weight, weights, -sum(self.sizes) % ALIGNED if self.padded else 0)
        self.bias = packed_parameters(self.bias, biases) if biases else None
        return self.weight, self.bias


def packed_parameters(known: Tensor | None, parameters: Sequence[Tensor], further: int = 0) -> Tensor:
    """Parameters side by side along their first dimension: `known` if every one still is a view of its part, else they
    are packed anew. `further` rows of zeros stand behind them."""
    if known is None or known.dtype != parameters[0].dtype:
        return _pack(parameters, further)
    pointer = known.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != pointer:
            return _pack(parameters, further)
        pointer += parameter.nbytes
    return known


# Never in inference mode: parameters must not become inference tensors, which could not be trained again.
@torch.inference_mode(False)
@torch.no_grad()
def _pack(parameters: Sequence[Tensor], further: int) -> Tensor:
    """Concatenates parameters along the first dimension and makes each a view of its part."""
    like, sizes = parameters[0], [parameter.shape[0] for parameter in parameters]
    packed = torch.cat([*(parameter.detach() for parameter in parameters), like.new_zeros(further, *like.shape[1:])])
    for parameter, part in zip(parameters, packed[: sum(sizes)].split(sizes), strict=True):
        parameter.data = part
    if packed.is_cuda:
        # Once: kernels of a decode step ask for weights before the launches ahead of them are done.
        torch.cuda.current_stream(packed.device).synchronize()
    return packed
