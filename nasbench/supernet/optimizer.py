"""AdamW on fp32 master weights for mixers that compute in any dtype, each mixer clipped, and skipped, alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nasbench.supernet.workers import Workers


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
    Parameters without a gradient are left alone, with their moments. No host synchronisation on a GPU.

    The gradients of all masters lie in one fp32 buffer, a group's side by side: one sum over processes, one norm and
    one scaling a group.

    Args:
        groups: name of a mixer -> its named parameters. The gradient norm is clipped per group.
        rate: what the learning rate of a group is multiplied by, of its name.

    Attributes:
        skipped: [groups] fp32, how often each group's gradient was not finite and counted as zero, since last cleared.
    """

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, nn.Parameter]],
        *,
        lr: float,
        weight_decay: float,
        clip: float,
        rate: Callable[[str], float] = lambda group: 1.0,
    ) -> None:
        self.lr, self.max_norm = lr, clip
        self.groups = {group: dict(parameters) for group, parameters in groups.items()}
        self.working = {f"{group}.{name}": p for group, ps in self.groups.items() for name, p in ps.items()}
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.working.items()
        }
        rates = {group: rate(group) for group in self.groups}
        equals = [
            {
                "params": [self.masters[f"{g}.{name}"] for g in rates if rates[g] == r for name in self.groups[g]],
                "rate": r,
            }
            for r in dict.fromkeys(rates.values())
        ]
        self.adam = torch.optim.AdamW(equals, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
        self.device = next(iter(self.masters.values())).device
        self.skipped = torch.zeros(len(self.groups), device=self.device)
        self._present: list[str] = []
        self._place = torch.zeros(0, dtype=torch.int64)
        buffer = torch.zeros(sum(p.numel() for p in self.masters.values()), device=self.device)
        self._views: dict[str, Tensor] = {}
        self._segments: dict[str, Tensor] = {}
        end = 0
        for group, parameters in self.groups.items():
            begin = end
            for name, parameter in parameters.items():
                self._views[f"{group}.{name}"] = buffer[end : end + parameter.numel()].view_as(parameter)
                end += parameter.numel()
            self._segments[group] = buffer[begin:end]

    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Takes master weights (all of them), and rounds the working weights from them."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(weights[name])
                if master is not self.working[name]:
                    self.working[name].copy_(master)

    def step(self, factor: float) -> None:
        """One step with the learning rate times `factor`; takes the gradients and drops them."""
        self.gather()
        self.clip()
        self.apply(factor)

    def gather(self) -> None:
        """Moves the gradients of the working weights to the masters, fp32.

        A CUDA graph may capture this and `clip` with the backward pass before them.
        """
        present, sources, targets = [], [], []
        for group, parameters in self.groups.items():
            names = [f"{group}.{name}" for name, p in parameters.items() if p.grad is not None]
            if not names:
                continue
            present.append(group)
            if len(names) < len(parameters):
                self._segments[group].zero_()
            for name in names:
                working = self.working[name]
                assert working.grad is not None
                sources.append(working.grad)
                targets.append(self._views[name])
                working.grad = None
                self.masters[name].grad = self._views[name]
        if targets:
            torch._foreach_copy_(targets, sources)
        if present != self._present:
            order = {group: i for i, group in enumerate(self.groups)}
            self._present = present
            self._place = torch.tensor([order[group] for group in present], dtype=torch.int64, device=self.device)

    def average(self, workers: Workers, shares: Tensor) -> None:
        """Sums the gathered gradients over the processes, each weighted by this process's share of the group.

        Args:
            shares: [groups]; a group's shares sum to 1 over the processes.
        """
        parts = shares[self._place].unbind()
        segments = [self._segments[group] for group in self._present]
        for segment, share in zip(segments, parts, strict=True):
            segment.mul_(share)
        workers.sum_(segments)

    def clip(self, usable: Tensor | None = None) -> None:
        """Clips each group's norm. A group whose gradient is not finite, or whose loss is not (`usable`, [groups]
        bool, is false), counts as having none, so that nothing of it reaches weights and moments; it is counted."""
        if not self._present:
            return
        segments = [self._segments[group] for group in self._present]
        norms = torch.stack(torch._foreach_norm(segments))
        good = norms.isfinite()
        if usable is not None:
            good &= usable[self._place]
        scales = torch.where(good, (self.max_norm / (norms + 1e-6)).clamp(max=1.0), 0.0)
        # On a GPU asking whether all are good would wait for it.
        clean = self.device.type == "cpu" and bool(good.all())
        for segment, scale in zip(segments, scales.unbind(), strict=True):
            segment.mul_(scale)
            if not clean:
                segment.nan_to_num_(0.0, 0.0, 0.0)
        self.skipped.index_add_(0, self._place, (~good).float())

    def apply(self, factor: float) -> None:
        """Steps the masters that have a gradient, and rounds the working weights from them."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor * group["rate"]
        self.adam.step()
        stepped = [name for name, master in self.masters.items() if master.grad is not None]
        rounded = [name for name in stepped if self.masters[name] is not self.working[name]]
        with torch.no_grad():
            if rounded:
                torch._foreach_copy_([self.working[n] for n in rounded], [self.masters[n] for n in rounded])
        for name in stepped:
            self.masters[name].grad = None

    def forget(self) -> None:
        """Drops every moment: the next step is a first one."""
        self.adam.state.clear()

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
