"""Losses over the vocabulary that never hold more than a few hundred tokens' logits.

Shapes: N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.core.by_device import ByDevice
from nasbench.model import fused

CHUNK = ByDevice(cpu=128, cuda=1024)
"""Tokens whose logits are scored at once. 128 are 25 MB in fp32 for a vocabulary of 49152, which a last-level cache
still holds: on two CPU cores 1024 tokens took 0.55 s with it, 0.75 s with 512, 0.28 s against a kept distribution."""


def _log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.log_softmax(F.linear(hidden, weight), -1, dtype=torch.float32)


class _ChunkedKL(torch.autograd.Function):
    """KL(teacher || student) summed over tokens. The head is frozen, so the gradient of the student's hidden states is
    all that backward needs, and forward makes it while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, chunk: int) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device, dtype=torch.float32)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            if fused.autograd_kernels(student):
                from nasbench_kernels.loss.divergence import divergence_rows

                logits = F.linear(student[part], weight)
                total += divergence_rows(logits, F.linear(teacher[part], weight), gradient=True)[0].sum()
                torch.mm(logits, weight, out=gradient[part])
                continue
            # Passes over logits in fp32 are what this costs: casts are left to the softmax, results replace arguments.
            target, log_p = _log_softmax(teacher[part], weight), _log_softmax(student[part], weight)
            p = target.exp()
            total += torch.linalg.vecdot(p, target.sub_(log_p)).sum()
            gradient[part] = torch.sub(log_p.exp_(), p, out=torch.empty_like(p, dtype=weight.dtype)) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


def distillation_kl(student: Tensor, teacher: Tensor, weight: Tensor, chunk: int = 512) -> Tensor:
    """Mean over the tokens of KL(teacher || student) in nats, fp32.

    Args:
        student, teacher: final normalised hidden states [..., C]; gradients reach the student's.
        weight: the shared frozen head, [V, C].
        chunk: tokens whose logits are held at once.
    """
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    return _ChunkedKL.apply(student, teacher, weight, chunk) / len(student)


@dataclass(frozen=True)
class Distribution:
    """A teacher's next-token distribution p over some positions, kept where many students are held against it.

    Attributes:
        p: [N, V] fp32.
        negentropy: sum of p log p, [N] fp32.
    """

    p: Tensor
    negentropy: Tensor


@torch.no_grad()
def teacher_distribution(hidden: Tensor, weight: Tensor) -> Distribution:
    """Of final normalised hidden states [B, T, C], at every position that has a next token."""
    flat = hidden[:, :-1].flatten(0, 1)
    p = torch.empty(len(flat), len(weight), device=flat.device)
    negentropy = torch.empty(len(flat), device=flat.device)
    chunk = CHUNK.of(flat.device)
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        log_p = _log_softmax(flat[part], weight)
        torch.exp(log_p, out=p[part])
        negentropy[part] = torch.linalg.vecdot(p[part], log_p)
    return Distribution(p, negentropy)


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    tokens: Tensor,
    weight: Tensor,
    teacher: Tensor | Distribution | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Next-token loss and KL to the teacher of every position that has a next token.

    Args:
        hidden: final normalised hidden states [B, T, C].
        tokens: [B, T] int64.
        teacher: its hidden states [B, T, C], or its distribution where that was kept.

    Returns:
        -log p(next token) [B, T-1] fp32 in nats, and KL(teacher || student) of the same shape, None without a teacher.
    """
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    flat = hidden[:, :-1].flatten(0, 1)
    reference = teacher[:, :-1].flatten(0, 1) if isinstance(teacher, Tensor) else None
    target = tokens[:, 1:].flatten()
    chunk = chunk or CHUNK.of(flat.device)
    nll, kl = [], []
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        if reference is not None and fused.autograd_kernels(flat):
            from nasbench_kernels.loss.divergence import divergence_rows

            logits = F.linear(flat[part], weight)
            divergence, log_sum = divergence_rows(logits, F.linear(reference[part], weight))
            nll.append(log_sum - logits.gather(-1, target[part, None])[:, 0].float())
            kl.append(divergence)
            continue
        log_p = _log_softmax(flat[part], weight)
        nll.append(-log_p.gather(-1, target[part, None])[:, 0])
        if isinstance(teacher, Distribution):
            kl.append(teacher.negentropy[part] - torch.linalg.vecdot(teacher.p[part], log_p))
        elif reference is not None:
            log_q = _log_softmax(reference[part], weight)
            kl.append(torch.linalg.vecdot(log_q.exp(), log_q - log_p))
    return torch.cat(nll).view(batch, length), torch.cat(kl).view(batch, length) if kl else None


def energy(target: Tensor) -> Tensor:
    """||target||^2 in fp32, a scalar that can be divided by."""
    return torch.linalg.vector_norm(target, dtype=torch.float32).square().clamp_min(1e-12)


class _SquaredError(torch.autograd.Function):
    """||value - target||^2 in fp32. Half-precision tensors are subtracted as they are, which rounds only the
    difference: casts to fp32 would write both to memory at twice their size."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, target: Tensor) -> Tensor:
        difference = value - target
        ctx.save_for_backward(difference)
        return torch.linalg.vector_norm(difference, dtype=torch.float32).square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradients[0]), None


def relative_error(value: Tensor, target: Tensor, target_energy: Tensor) -> Tensor:
    """||value - target||^2 / ||target||^2 in fp32, a scalar: the alignment loss of a mixer. The target is constant."""
    return _SquaredError.apply(value, target) / target_energy
