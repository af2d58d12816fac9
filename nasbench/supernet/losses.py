"""Losses over the vocabulary that never hold more than a few hundred tokens' logits.

Shapes: N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.backbone.decoder import Decoder


def output_weight(decoder: Decoder) -> Tensor:
    """The matrix of the head, [V, C]: the embedding's where they are tied."""
    return decoder.model.embed_tokens.weight if decoder.lm_head is None else decoder.lm_head.weight


class _ChunkedKL(torch.autograd.Function):
    """KL(teacher || student) summed over tokens. The head is frozen, so the gradient of the student's hidden states is
    all that backward needs, and forward makes it while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, chunk: int) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device, dtype=torch.float32)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            target = F.log_softmax(F.linear(teacher[part], weight).float(), -1)
            log_p = F.log_softmax(F.linear(student[part], weight).float(), -1)
            p = target.exp()
            total += (p * (target - log_p)).sum()
            gradient[part] = (log_p.exp_().sub_(p)).to(weight.dtype) @ weight
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


@torch.no_grad()
def token_losses(
    hidden: Tensor, tokens: Tensor, weight: Tensor, teacher: Tensor | None = None, chunk: int = 512
) -> tuple[Tensor, Tensor | None]:
    """Next-token loss and KL to the teacher of every position that has a next token.

    Args:
        hidden, teacher: final normalised hidden states [B, T, C].
        tokens: [B, T] int64.

    Returns:
        -log p(next token) [B, T-1] fp32 in nats, and KL(teacher || student) of the same shape, None without a teacher.
    """
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    flat = hidden[:, :-1].flatten(0, 1)
    reference = None if teacher is None else teacher[:, :-1].flatten(0, 1)
    target = tokens[:, 1:].flatten()
    nll, kl = [], []
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        log_p = F.log_softmax(F.linear(flat[part], weight).float(), -1)
        nll.append(-log_p.gather(-1, target[part, None])[:, 0])
        if reference is not None:
            log_q = F.log_softmax(F.linear(reference[part], weight).float(), -1)
            kl.append((log_q.exp() * log_q.sub(log_p)).sum(-1))
    return torch.cat(nll).view(batch, length), torch.cat(kl).view(batch, length) if kl else None


def relative_error(value: Tensor, target: Tensor) -> Tensor:
    """||value - target||^2 / ||target||^2 in fp32, a scalar: the alignment loss of one mixer."""
    target = target.float()
    return (value.float() - target).square().sum() / target.square().sum().clamp_min(1e-12)
