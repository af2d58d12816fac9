"""How the layers of a sub-network are called: one kernel after another, or each layer replayed from CUDA graphs.

A random sub-network is different in every step, so a whole step cannot be captured; but each of its layers is one of a
few. With graphs of every layer's forward and backward pass, one per kind, a step launches some hundred graphs instead
of ten thousand kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from nasbench.data.packing import Batch
from nasbench.model.documents import Documents
from nasbench.model.meta import SequenceMeta
from nasbench.supernet.supernet import Supernet

TEACHER = ""
"""Names the teacher's own layer, beside which a finalised hybrid may have an attention layer of its own."""


class LayerCalls:
    """Layers called kernel by kernel.

    Args:
        recompute: activations are computed again in the backward pass.
    """

    def __init__(self, net: Supernet, recompute: bool = False) -> None:
        self.net, self.recompute = net, recompute

    def __call__(self, layer: int, name: str, x: Tensor, meta: SequenceMeta) -> Tensor:
        """Residual stream x [B, T, C] through a sub-network's layer with the mixer `name`; TEACHER: the teacher's."""
        module = self.net.teacher.layers[layer] if name == TEACHER else self.net.layer(layer, name)
        if self.recompute and torch.is_grad_enabled():
            return recomputed(module, x, meta, use_reentrant=False, preserve_rng_state=False)
        return module(x, meta)

    def keep(self, x: Tensor) -> Tensor:
        """A result that must outlive further calls of the layer that gave it."""
        return x

    def keep_gradients(self) -> None:
        """The gradients so far must outlive further calls."""


class _Layer(nn.Module):
    """A layer whose arguments are tensors alone, as graphs want them."""

    def __init__(self, net: Supernet, layer: int, name: str) -> None:
        super().__init__()
        self.layer = net.teacher.layers[layer] if name == TEACHER else net.layer(layer, name)
        self.teacher = [net.teacher]  # in a list: not a part of this module

    def forward(self, x: Tensor, ages: Tensor | None = None) -> Tensor:
        documents = None if ages is None else Documents(ages)
        return self.layer(x, self.teacher[0].sequence_meta(0, x.shape[1], documents))


class GraphedLayerCalls(LayerCalls):
    """Layers replayed from CUDA graphs, for batches of one shape.

    Args:
        choices: per layer the mixers that will be called, beside the teacher's layer.
        batch: of the shape and device of all that follow.
    """

    def __init__(self, net: Supernet, choices: Sequence[Sequence[str]], batch: Batch) -> None:
        super().__init__(net)
        wanted = list(
            dict.fromkeys(self._key(i, name) for i, names in enumerate(choices) for name in (TEACHER, *names))
        )
        x = net.teacher.embed(batch.tokens).detach()
        # Each graph reads its own copy of its arguments. In the order of a forward pass, which lets them share memory.
        ages = [] if batch.ages is None else [batch.ages]
        arguments = [(x.clone().requires_grad_(), *(tensor.clone() for tensor in ages)) for _ in wanted]
        modules = tuple(_Layer(net, layer, name).train(net.teacher.training) for layer, name in wanted)
        with torch.no_grad():
            # Moves projections into one matrix each, which later passes without gradients then leave where it is.
            for module, given in zip(modules, arguments, strict=True):
                module(*given)
        # The captures have a stream of their own, so gradients always arrive from another one: autograd waits for it,
        # and warns, which says nothing to a user.
        quiet = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if quiet is not None:
            quiet(False)
        calls = torch.cuda.make_graphed_callables(modules, tuple(arguments), allow_unused_input=True)
        self.calls = dict(zip(wanted, cast("tuple[Callable[..., Tensor], ...]", calls), strict=True))

    def __call__(self, layer: int, name: str, x: Tensor, meta: SequenceMeta) -> Tensor:
        documents = meta.documents
        return self.calls[self._key(layer, name)](x, *([] if documents is None else [documents.ages]))

    def _key(self, layer: int, name: str) -> tuple[int, str]:
        """One graph for the teacher's layer and a sub-network's where they are the same."""
        same = name == TEACHER or (self.net.space.is_original(layer, name) and (layer, name) not in self.net.own)
        return layer, TEACHER if same else name

    def keep(self, x: Tensor) -> Tensor:
        return x.clone()

    def keep_gradients(self) -> None:
        # They lie in the graphs' memory, which the next forward pass writes over.
        for module in (*self.net.mixers(), *self.net.own.values()):
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()
