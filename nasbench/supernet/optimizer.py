"""AdamW on fp32 master weights for mixers that compute in any dtype, each mixer clipped alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def cosine(step: int, steps: int, warmup: float, floor: float = 0.1) -> float:
    """The learning rate's factor at 0-based `step`: linear warm-up over a share of the steps, cosine to `floor`."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class MasterAdamW:
    """AdamW over named groups of parameters.

    A parameter in fp32 is its own master; one in bf16 gets an fp32 master and is its rounding after every step.
    Parameters without a gradient are left alone, with their moments. No host synchronisation.

    Args:
        groups: name of a mixer -> its named parameters. The gradient norm is clipped per group.
    """

    def __init__(
        self, groups: Mapping[str, Mapping[str, nn.Parameter]], *, lr: float, weight_decay: float, clip: float
    ) -> None:
        self.lr, self.clip = lr, clip
        self.groups = {group: dict(parameters) for group, parameters in groups.items()}
        self.working = {f"{group}.{name}": p for group, ps in self.groups.items() for name, p in ps.items()}
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.working.items()
        }
        self.adam = torch.optim.AdamW(
            list(self.masters.values()), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )

    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Takes master weights (all of them), and rounds the working weights from them."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(weights[name])
                if master is not self.working[name]:
                    self.working[name].copy_(master)

    def step(self, factor: float) -> None:
        """One step with the learning rate times `factor`; takes the gradients and drops them."""
        self.collect()
        self.apply(factor)

    def collect(self) -> None:
        """Moves the gradients of the working weights to the masters, fp32, each mixer's norm clipped.

        A CUDA graph may capture this with the backward pass before it.
        """
        for group_name, parameters in self.groups.items():
            names = [f"{group_name}.{name}" for name, p in parameters.items() if p.grad is not None]
            if not names:
                continue
            gradients = [g.float() for name in names if (g := self.working[name].grad) is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (self.clip / (norm + 1e-6)).clamp(max=1.0))
            for name, gradient in zip(names, gradients, strict=True):
                self.working[name].grad = None
                self.masters[name].grad = gradient

    def apply(self, factor: float) -> None:
        """Steps the masters that have a gradient, and rounds the working weights from them."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        stepped = [name for name, master in self.masters.items() if master.grad is not None]
        rounded = [name for name in stepped if self.masters[name] is not self.working[name]]
        with torch.no_grad():
            if rounded:
                torch._foreach_copy_([self.working[n] for n in rounded], [self.masters[n] for n in rounded])
        for name in stepped:
            self.masters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """The moments and step counts of every parameter that has been stepped, by name."""
        return {
            f"{key}:{name}": value
            for name, master in self.masters.items()
            for key, value in self.adam.state.get(master, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for key, value in state.items():
            kind, name = key.split(":", 1)
            if name in self.masters:
                # Fused AdamW keeps its step counts where the parameters are.
                self.adam.state[self.masters[name]][kind] = value.to(self.masters[name].device, copy=True)
