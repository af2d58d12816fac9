"""The plain recurrences against flash-linear-attention's kernels, in bf16: outputs, states and every gradient."""

from importlib import import_module

import pytest
import torch
from nasbench_kernels.gated_delta import chunked_gated_delta
from tolerances import relative_rmse
from torch.nn import functional as F

pytestmark = pytest.mark.gpu
CLOSE = 5e-3
NAMES = ("q", "k", "v", "g", "beta", "state")
RETENTION = torch.log1p(-(2.0 ** (-5 - torch.arange(3.0))))
OPERATIONS = {
    "D": ("delta_rule.chunk_delta_rule", lambda q, k, v, g, beta: {"q": q, "k": k, "v": v, "beta": beta}),
    "T": ("retention.chunk_retention", lambda q, k, v, g, beta: {"q": q, "k": k, "v": v}),
    "L": ("gla.chunk_gla", lambda q, k, v, g, beta: {"q": q, "k": k, "v": v, "g": g}),
    "K": ("kda.chunk_kda", lambda q, k, v, g, beta: {"q": q, "k": k, "v": v, "g": g, "beta": beta}),
}


def outcome(form, tensors):
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in tensors]
    output, state = form(*leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).cuda()
    ((output.float() * weight).sum() + state.square().sum()).backward()
    gradients = {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    return {"output": output, "final state": state, **gradients}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_the_plain_form_is_flas(kind):
    pytest.importorskip("fla")
    name, arguments = OPERATIONS[kind]
    module, _, function = name.partition(".")
    operation = getattr(import_module(f"fla.ops.{module}"), function)
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(2, 150, 3, 64, device="cuda"), dim=-1).bfloat16() for _ in range(2))
    v = torch.randn(2, 150, 3, 64, device="cuda").bfloat16()
    g = {"D": torch.zeros(3), "T": RETENTION}.get(kind, torch.tensor(-0.2)).cuda()
    g = g * (torch.rand(2, 150, 3, 64, device="cuda") if kind in "LK" else torch.ones(2, 150, 3, device="cuda"))
    beta = torch.rand(2, 150, 3, device="cuda").bfloat16() if kind in "DK" else None
    tensors = [q, k, v, g, beta, torch.randn(2, 3, 64, 64, device="cuda")]
    theirs = outcome(lambda *x: operation(**arguments(*x[:5]), initial_state=x[5], output_final_state=True), tensors)
    for name, value in outcome(chunked_gated_delta, tensors).items():
        if theirs[name] is not None:  # decays that the kernel takes as constants
            assert relative_rmse(theirs[name].float(), value.float()) < CLOSE, name
