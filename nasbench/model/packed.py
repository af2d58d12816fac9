"""Several projections of one input as one matrix product, without changing parameter names or doubling memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StackedProjections:
    """Computes `[linear(x) for linear in linears]`, in one product when nothing needs a gradient.

    The first such call moves the weights into one matrix and makes every parameter a view of its rows: state
    dictionaries, optimisers and in-place updates see what they saw before. When a parameter has been replaced since
    (moved to a device, cast, loaded by assignment), they are stacked again. A decode step is a row of small
    products, and each costs more to start (a kernel launch, a oneDNN primitive) than to compute.

    A plain object, not a module: it owns no parameters. The projections all have a bias, or none has.

    Attributes:
        apart: the parameters must stay where they are, as FSDP2's do: the products are single ones always.
    """

    apart = False

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = tuple(linears)
        self.sizes = [linear.out_features for linear in self.linears]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if self.apart or torch.is_grad_enabled():
            return [linear(x) for linear in self.linears]
        return F.linear(x, *self.matrices()).split(self.sizes, dim=-1)

    def stay_apart(self) -> None:
        """Gives every parameter that lies in one matrix with others its own memory again, and leaves it there."""
        self.apart = True
        self.weight = self.bias = None
        for linear in self.linears:
            for parameter in linear.parameters():
                parameter.data = parameter.data.clone()

    def matrices(self) -> tuple[Tensor, Tensor | None]:
        """The one weight [sum of outputs, C] and bias. The parameters are views of them from now on, unless they stay
        apart."""
        if self.apart:
            weights: list[Tensor] = [linear.weight for linear in self.linears]
            biases: list[Tensor] = [linear.bias for linear in self.linears if linear.bias is not None]
            return torch.cat(weights), torch.cat(biases) if biases else None
        self.weight = stacked_parameters(self.weight, [linear.weight for linear in self.linears])
        if self.linears[0].bias is not None:
            self.bias = stacked_parameters(self.bias, [linear.bias for linear in self.linears])
        return self.weight, self.bias


def stacked_parameters(known: Tensor | None, parameters: Sequence[Tensor]) -> Tensor:
    """Parameters side by side along their first dimension: `known` if every one still is a view of its part, else they
    are stacked anew."""
    if known is None or known.dtype != parameters[0].dtype:
        return _stack(parameters)
    pointer = known.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != pointer:
            return _stack(parameters)
        pointer += parameter.nbytes
    return known


# Never in inference mode: parameters must not become inference tensors, which could not be trained again.
@torch.inference_mode(False)
@torch.no_grad()
def _stack(parameters: Sequence[Tensor]) -> Tensor:
    """Concatenates parameters along the first dimension and makes each a view of its part."""
    stacked = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, stacked.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    if stacked.is_cuda:
        # Once: kernels of a decode step ask for weights before the launches ahead of them are done.
        torch.cuda.current_stream(stacked.device).synchronize()
    return stacked
