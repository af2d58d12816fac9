"""A supernet whose weights are sharded over the processes, for models that one card does not hold (FSDP2).

An FSDP unit is what is used together: the embedding, the head, every MLP, every mixer, the teacher's attention among
them. Each process keeps 1/N of a unit's weights, rows of every matrix; a unit is whole in forward and backward only.
Norms and what has too few rows to shard (a gate's bias per head) stay whole everywhere.

A sub-network chooses one unit or another for each layer. So a unit wraps its module without becoming it, and
`nasbench.model.block.with_weights` calls a function with the module through the wrapper. The wrapper's hooks gather the
weights and free them, in the backward pass too. Every process calls the same units in the same order: sub-networks are
functions of seed and step.

What is trained is kept in fp32, its own master: FSDP2 rounds each shard to the model's dtype before it gathers, and
adds gradients in fp32. With gradient and moments a trained weight takes 16 bytes in the process that has its shard.
FSDP2 takes the mean over processes: steps weight their loss by this process's part of the whole times N.

The first process has read the whole model into its host's memory and gives the others one unit after another: they
begin with tensors on the meta device. A card never holds more than its shards and one unit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, distributed, nn

from nasbench.core.errors import UserError
from nasbench.model.block import UNIT, Block
from nasbench.parallel.context import SINGLE, DistContext, own_device

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Unit(nn.Module):
    """Weights that are gathered, used and let go of together."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return work(self.module, *arguments)


class _Root(nn.Module):
    """All units, so that they share FSDP2's streams and buffers: one unit's gradients are whole at a time."""

    def __init__(self, units: list[Unit]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, _: Tensor) -> None:
        """Nothing: the first call ends FSDP2's construction."""


def check(shard: bool) -> None:
    """Raises UserError where nobody started processes that share the weights."""
    if shard and not distributed.is_initialized():
        raise UserError("shard needs torchrun: start with `torchrun --nproc-per-node N -m nasbench`, or say --no-shard")


def place_of(shard: bool, device: str, workers: DistContext = SINGLE) -> str:
    """Where a process reads a model to: weights that will be sharded are never whole on the device, and only the first
    process reads them at all."""
    if not workers.is_main:
        return "meta"
    return "cpu" if shard else device


def receive(modules: Iterable[nn.Module], device: torch.device, workers: DistContext) -> None:
    """Moves what is not sharded of modules to this process's device, with the first process's values."""
    tensors = []
    for owner in dict.fromkeys(part for module in modules for part in module.modules()):
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if is_sharded(tensor):
                continue
            if tensor.is_meta:
                empty = torch.empty_like(tensor, device=device, requires_grad=False)
                is_parameter = isinstance(tensor, nn.Parameter)
                tensor = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                setattr(owner, name, tensor)
            else:
                tensor.data = tensor.data.to(device)
            tensors.append(tensor.detach())
    workers.broadcast(tensors)


def spread(net: Any, sharded: bool, workers: DistContext) -> None:
    """Gives a supernet that the first process has read to all: whole, or to each its shards.

    Which parameters are trained must be known by now.
    """
    if sharded:
        _shard(net, workers)
    elif workers.size > 1:
        receive((net.teacher, *net.mixers(), *net.own.values()), own_device(), workers)


def _shard(net: Any, workers: DistContext) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = own_device()
    mesh = init_device_mesh(device.type, (workers.size,))
    dtype = net.teacher.dtype
    units = []
    for module in _modules(net):
        receive((module,), device, workers)
        trained = any(parameter.requires_grad for parameter in module.parameters())
        whole = {p for p in module.parameters() if p.dtype != dtype or not _even(p, workers.size)}
        for part in module.modules():
            if isinstance(part, Block):
                part.packed.unpack()
        if trained:
            for parameter in module.parameters():
                if parameter not in whole:
                    parameter.data = parameter.data.float()
        rounding = MixedPrecisionPolicy(dtype if trained else None, torch.float32 if trained else None, None, False)
        unit = Unit(module)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=rounding, ignored_params=whole)
        if device.type == "cpu":
            cast(Any, unit).set_force_sum_reduction_for_comms(True)  # gloo takes no mean
        object.__setattr__(module, UNIT, unit)
        units.append(unit)
    root = _Root(units)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    receive((net.teacher, *net.mixers(), *net.own.values()), device, workers)
    root(torch.empty(0, device=device))  # FSDP2 takes no call without arguments on GPUs
    net.shards = root


def _modules(net: Any) -> Iterator[nn.Module]:
    teacher = net.teacher
    candidates: list[nn.Module | None] = [teacher.model.embed_tokens, teacher.lm_head, *net.mixers()]
    for layer in (*teacher.layers, *net.own.values()):
        candidates += [layer.self_attn, layer.mlp]
    return (module for module in dict.fromkeys(candidates) if module is not None)


def _even(parameter: Tensor, size: int) -> bool:
    """Whether every process gets some of a parameter's rows."""
    return parameter.ndim > 0 and -(-parameter.shape[0] // size) * (size - 1) < parameter.shape[0]


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a process has only a shard of the tensor. Importing DTensor takes a second, which most commands need not
    spend: where nobody has imported it, no tensor is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, in the same memory; a whole tensor as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor, whole or sharded, that stands where `like`'s shard does."""
    if not is_sharded(like):
        return value
    if is_sharded(value):
        return local(value)
    size, rank = like.device_mesh.size(), like.device_mesh.get_local_rank()
    return value.chunk(size)[rank]


def sharded_like(like: Tensor, share: Tensor) -> Tensor:
    """The tensor, sharded as `like`, of which this process has `share`."""
    if not is_sharded(like):
        return share
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Writes a value, whole or sharded, into a parameter, whole or sharded."""
    local(parameter).copy_(local_part(value, parameter))


def full_state_dict(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Every tensor whole, fp32, on the CPU, one after another. Every process must ask; without `keep` it gets none."""
    whole = {}
    for name, tensor in tensors.items():
        value = full(tensor.detach())
        if keep:
            whole[name] = value.float().cpu()
    return whole
