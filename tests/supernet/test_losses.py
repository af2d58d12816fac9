"""Chunked losses against the plain formulas; the optimiser against torch's."""

import pytest
import torch
from tolerances import GRADIENT_FP32, relative_rmse
from torch.nn import functional as F

from nasbench.supernet.losses import distillation_kl, energy, relative_error, token_losses
from nasbench.supernet.optimizer import MasterAdamW, cosine


def step(optimizer, factor=1.0):
    optimizer.gather()
    optimizer.clip()
    optimizer.apply(factor)


def test_chunked_kl_equals_the_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 11, 8, requires_grad=True), torch.randn(2, 11, 8)
    weight = torch.randn(37, 8)
    loss = distillation_kl(student, teacher, weight, chunk=5)
    (3 * loss).backward()
    chunked, student.grad = student.grad, None
    log_p, log_q = F.log_softmax(student @ weight.T, -1), F.log_softmax(teacher @ weight.T, -1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    (3 * expected).backward()
    assert relative_rmse(loss, expected) < GRADIENT_FP32
    assert relative_rmse(chunked, student.grad) < GRADIENT_FP32


def test_token_losses_equal_the_formula():
    torch.manual_seed(0)
    hidden, teacher, weight = torch.randn(3, 9, 8), torch.randn(3, 9, 8), torch.randn(37, 8)
    tokens = torch.randint(37, (3, 9))
    nll, kl = token_losses(hidden, tokens, weight, teacher, chunk=4)
    logits = hidden[:, :-1] @ weight.T
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 8)
    assert relative_rmse(nll, expected) < 1e-5
    reference = F.log_softmax(teacher[:, :-1] @ weight.T, -1)
    expected = F.kl_div(F.log_softmax(logits, -1), reference, log_target=True, reduction="none").sum(-1)
    assert relative_rmse(kl, expected) < 1e-5


def test_relative_error_is_one_for_nothing_and_zero_for_everything():
    target = torch.randn(4, 5)
    assert float(relative_error(torch.zeros(4, 5), target, energy(target))) == 1.0
    assert float(relative_error(target, target, energy(target))) == 0.0


def test_optimizer_equals_adamw_with_each_group_clipped_alone():
    torch.manual_seed(0)
    ours = {name: torch.nn.Parameter(torch.randn(3, 3)) for name in "ab"}
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    optimizer = MasterAdamW({name: {"w": p} for name, p in ours.items()}, lr=0.1, weight_decay=0.0, clip=1.0)
    reference = torch.optim.AdamW(theirs.values(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for scale in (1.0, 50.0, 0.01):
        for group in (ours, theirs):
            for i, p in enumerate(group.values()):
                p.grad = torch.full((3, 3), scale * (i + 1))
        for p in theirs.values():
            torch.nn.utils.clip_grad_norm_([p], 1.0)
        step(optimizer)
        reference.step()
    for name in ours:
        assert relative_rmse(ours[name], theirs[name]) < 1e-5, name
        assert ours[name].grad is None


def test_optimizer_leaves_what_has_no_gradient_and_keeps_fp32_masters():
    parameters = {name: torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for name in "ab"}
    optimizer = MasterAdamW({"g": parameters}, lr=1e-4, weight_decay=0.0, clip=1.0)
    for _ in range(20):
        parameters["a"].grad = torch.ones(4, dtype=torch.bfloat16)
        step(optimizer)
    assert torch.equal(parameters["b"], torch.ones(4, dtype=torch.bfloat16))
    # Each step is below bf16's resolution at 1; only the master can have summed them.
    assert abs(float(optimizer.masters["g.a"].detach()[0]) - 0.998) < 1e-4
    assert torch.equal(parameters["a"], optimizer.masters["g.a"].to(torch.bfloat16))


def test_cosine_warms_up_and_ends_low():
    factors = [cosine(step, 100, 0.1) for step in range(100)]
    assert factors[:2] == [0.1, 0.2]
    assert max(factors) == 1.0
    assert 0.1 <= factors[-1] < 0.11


def test_groups_may_have_learning_rates_of_their_own():
    ours = {name: torch.nn.Parameter(torch.ones(3)) for name in "ab"}
    rates = {"a": 1.0, "b": 0.2}
    optimizer = MasterAdamW(
        {name: {"w": p} for name, p in ours.items()}, lr=0.1, weight_decay=0.0, clip=1.0, rate=rates.__getitem__
    )
    for p in ours.values():
        p.grad = torch.ones(3)
    step(optimizer, 0.5)
    # Adam's first step is the learning rate.
    assert torch.allclose(ours["a"], torch.full((3,), 0.95))
    assert torch.allclose(ours["b"], torch.full((3,), 0.99))


@pytest.mark.gpu
def test_losses_on_a_gpu_equal_those_on_a_cpu():
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(2, 33, 16) for _ in range(2))
    weight, tokens = torch.randn(9001, 16), torch.randint(9001, (2, 33))
    results = []
    for device in ("cpu", "cuda"):
        hidden = student.detach().clone().to(device).requires_grad_()
        loss = distillation_kl(hidden, teacher.to(device), weight.to(device), chunk=10)
        (3 * loss).backward()
        nll, kl = token_losses(hidden.detach(), tokens.to(device), weight.to(device), teacher.to(device), chunk=10)
        results.append([x.detach().cpu() for x in (loss, hidden.grad, nll, kl)])
    for name, slow, fast in zip(("kl", "gradient", "nll", "row kl"), *results, strict=True):
        assert relative_rmse(fast, slow) < GRADIENT_FP32, name
