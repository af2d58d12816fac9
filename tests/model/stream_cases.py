"""A small decoder, and what streams are compared by. Kernels run in Triton's interpreter where there is no GPU."""

import os
from importlib.util import find_spec

import pytest
import torch
from tolerances import relative_rmse

from nasbench.model import fused
from nasbench.model.decoder import Decoder
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import parse_placement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def decoder(placement, dtype=torch.float32, head_dim=16, num_heads=3, **further):
    placement = parse_placement(placement)
    shape = ModelSpec(
        name="tiny", family="llama", num_layers=len(placement), hidden_size=48, intermediate_size=72,
        num_heads=num_heads, num_kv_heads=1, head_dim=head_dim, vocab_size=97, max_context=256,
        rope_theta=10000.0, rms_eps=1e-5,
        **further,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(shape, placement).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def outcome(form, module, x):
    """Output, and gradients of the input and of every parameter, by name."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = form(x)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(x.device)
    (output.float() * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input": x.grad, **found}


def compare(fast, slow, tolerance):
    assert fast.keys() == slow.keys()
    for name in slow:
        assert relative_rmse(fast[name].float(), slow[name].float()) < tolerance, name


@pytest.fixture
def plain(monkeypatch):
    """The kernels run wherever the test does; `plain(work)` is what PyTorch alone computes."""
    monkeypatch.setattr(fused, "autograd_kernels", lambda x: True)

    def without_kernels(work):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "autograd_kernels", lambda x: False)
            return work()

    return without_kernels
