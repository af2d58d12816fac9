"""The divergence of logits in plain PyTorch, fp32: the truth that its kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def naive_divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] twice -> KL(teacher || student) and log sum exp of the student's logits, [N] each, and the gradient
    of the KL's sum by the student's logits, [N, V]."""
    log_p, log_q = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return kl, torch.logsumexp(student.float(), -1), log_p.exp() - log_q.exp()
