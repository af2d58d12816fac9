"""AdamW on fp32 master weights for mixers that compute in any dtype, each mixer clipped, and skipped, alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nasbench.parallel.context import SINGLE, DistContext
from nasbench.parallel.fsdp import is_sharded, local, local_part, sharded_like


def cosine(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor at 0-based `step`: linear warm-up over a share of the steps, cosine to a tenth."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


class MasterAdamW:
    """AdamW over named groups of parameters.

    A parameter in fp32 is its own master; one in bf16 gets an fp32 master and is its rounding after every step.
    Parameters without a gradient are left alone, with their moments. No host synchronisation on a GPU.

    The gradients of all masters lie in one fp32 buffer, a group's side by side: one sum over processes, one norm and
    one scaling a group.

    A sharded parameter (nasbench.parallel.fsdp) is fp32 and its own master: gradients, moments and steps are those of
    this process's shard, and only a group's norm needs the others.

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
        self.masters = {name: _master(p) for name, p in self.working.items()}
        rates: dict[float, list[nn.Parameter]] = {}
        for group, ps in self.groups.items():
            rates.setdefault(rate(group), []).extend(self.masters[f"{group}.{name}"] for name in ps)
        equals = [{"params": params, "rate": factor} for factor, params in rates.items()]
        self.adam = torch.optim.AdamW(equals, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
        self.device = next(iter(self.masters.values())).device
        self.skipped = torch.zeros(len(self.groups), device=self.device)
        self._present: list[str] = []
        self._place = torch.zeros(0, dtype=torch.int64)
        buffer = torch.zeros(sum(p.numel() for p in self.masters.values()), device=self.device)
        self._views: dict[str, Tensor] = {}
        self._segments: dict[str, Tensor] = {}
        self._sharded: dict[str, Tensor] = {}
        self._rest: dict[str, Tensor] = {}
        """A group's segment begins with the gradients of sharded parameters; the rest is whole in every process."""
        self.sharded = any(is_sharded(p) for p in self.working.values())
        end = 0
        for group, parameters in self.groups.items():
            begin = middle = end
            for name in sorted(parameters, key=lambda name: not is_sharded(parameters[name])):
                master = self.masters[f"{group}.{name}"]
                self._views[f"{group}.{name}"] = buffer[end : end + master.numel()].view_as(master)
                end += master.numel()
                if is_sharded(parameters[name]):
                    middle = end
            self._segments[group] = buffer[begin:end]
            self._sharded[group], self._rest[group] = buffer[begin:middle], buffer[middle:end]

    def weights(self) -> dict[str, Tensor]:
        """The masters by name; of sharded parameters the parameters themselves."""
        return {
            name: working.detach() if is_sharded(working) else self.masters[name].detach()
            for name, working in self.working.items()
        }

    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Takes master weights (all of them), and rounds the working weights from them."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(local_part(weights[name], self.working[name]))
                if self._rounds(name):
                    self.working[name].copy_(master)

    def _rounds(self, name: str) -> bool:
        """Whether a working weight is its master's rounding, and not the master itself."""
        return self.working[name].dtype != torch.float32

    def gather(self) -> None:
        """Moves the gradients of the working weights to the masters, fp32.

        A CUDA graph may capture this and `clip` with the backward pass before them.
        """
        present, sources, targets = [], [], []
        for group, parameters in self.groups.items():
            found = {f"{group}.{name}": p.grad for name, p in parameters.items() if p.grad is not None}
            if not found:
                continue
            present.append(group)
            if len(found) < len(parameters):
                self._segments[group].zero_()
            for name, gradient in found.items():
                sources.append(local(gradient))
                targets.append(self._views[name])
                self.working[name].grad = None
                self.masters[name].grad = self._views[name]
        if targets:
            torch._foreach_copy_(targets, sources)
        if present != self._present:
            order = {group: i for i, group in enumerate(self.groups)}
            self._present = present
            self._place = torch.tensor([order[group] for group in present], dtype=torch.int64, device=self.device)

    def average(self, workers: DistContext, shares: Tensor) -> None:
        """Sums the gathered gradients over the processes, each weighted by this process's share of the group.

        With shards, the losses are weighted already and FSDP2 has taken the mean of sharded gradients; here the rest
        follows.

        Args:
            shares: [groups]; a group's shares sum to 1 over the processes.
        """
        if self.sharded:
            rest = [self._rest[group] for group in self._present]
            workers.all_reduce([segment for segment in rest if segment.numel()])
            for segment in rest:
                segment.div_(workers.size)
            return
        parts = shares[self._place].unbind()
        segments = [self._segments[group] for group in self._present]
        for segment, share in zip(segments, parts, strict=True):
            segment.mul_(share)
        workers.all_reduce(segments)

    def _norms(self, workers: DistContext) -> Tensor:
        """The norms of the present groups' gradients, over all shards, [present] fp32: the same in every process."""

        def norms(parts: Mapping[str, Tensor]) -> Tensor:
            return torch.stack(torch._foreach_norm([parts[group] for group in self._present]))

        if not self.sharded:
            return norms(self._segments)
        squares = norms(self._sharded).square()
        workers.all_reduce([squares])
        return (squares + norms(self._rest).square()).sqrt()

    def clip(self, usable: Tensor | None = None, workers: DistContext = SINGLE) -> None:
        """Clips each group's norm. A group whose gradient is not finite, or whose loss is not (`usable`, [groups]
        bool, is false), counts as having none, so that nothing of it reaches weights and moments; it is counted.
        """
        if not self._present:
            return
        segments = [self._segments[group] for group in self._present]
        norms = self._norms(workers)
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
        rounded = [name for name in stepped if self._rounds(name)]
        with torch.no_grad():
            if rounded:
                torch._foreach_copy_([self.working[n] for n in rounded], [self.masters[n] for n in rounded])
        for name in stepped:
            self.masters[name].grad = None

    def reset_state(self) -> None:
        """Drops every moment: the next step is a first one."""
        self.adam.state.clear()

    def state(self) -> dict[str, Tensor]:
        """The moments and step counts of every stepped parameter, by name; moments are sharded as parameters are."""
        return {
            f"{key}:{name}": sharded_like(self.working[name], value) if value.ndim else value
            for name, master in self.masters.items()
            for key, value in self.adam.state.get(master, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; what is whole there may be sharded here."""
        for key, value in state.items():
            kind, name = key.split(":", 1)
            if name in self.masters:
                master = self.masters[name]
                share = local_part(value, self.working[name]) if value.ndim else value
                # Fused AdamW keeps its step counts where the parameters are.
                self.adam.state[master][kind] = share.to(master.device, copy=True)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if is_sharded(parameter):
        assert parameter.dtype == torch.float32
        return nn.Parameter(local(parameter.detach()))  # in the same memory
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
