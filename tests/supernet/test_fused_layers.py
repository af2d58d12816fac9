"""Layers as training runs them on a GPU against the layers as their kinds define them, forward and every gradient."""

import os
from importlib.util import find_spec

import pytest
import torch
from tolerances import BF16, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

from nasbench.data.packing import Batch
from nasbench.model.decoder import Decoder
from nasbench.model.documents import Documents
from nasbench.model.shapes import ModelSpec
from nasbench.supernet import fused_layers
from nasbench.supernet.forward import chunk_of
from nasbench.supernet.losses import distillation_kl, token_losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
AGES = torch.tensor([[*range(30), *range(40)], [*range(64), *range(6)]], dtype=torch.int32)


def decoder(name, dtype=torch.float32, head_dim=16):
    shape = ModelSpec(
        name="tiny", family="llama", num_layers=1, hidden_size=48, intermediate_size=72, num_heads=3, num_kv_heads=1,
        head_dim=head_dim, vocab_size=97, max_context=256, rope_theta=10000.0, rms_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(shape, (name,)).to(DEVICE, dtype)
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


@pytest.mark.parametrize("documents", [False, True])
def test_jet_block(documents):
    model = decoder("J")
    chunk = chunk_of(model, Batch(torch.zeros(2, 70, dtype=torch.int64), AGES.to(DEVICE) if documents else None))
    mixer, x = model.layers[0].self_attn, torch.randn(2, 70, 48).to(DEVICE)
    fast = outcome(lambda x: fused_layers.fused_jet_block(mixer, x, chunk), mixer, x)
    compare(fast, outcome(lambda x: mixer(x, chunk), mixer, x), GRADIENT_FP32)


@pytest.mark.parametrize("learnt", [False, True])
def test_mlp(learnt):
    mlp, x = decoder("A").layers[0].mlp.requires_grad_(learnt), torch.randn(2, 33, 48).to(DEVICE)
    fast = outcome(lambda x: fused_layers.fused_mlp(mlp, x), mlp, x)
    compare(fast, outcome(mlp, mlp, x), GRADIENT_FP32)


def test_projections_with_biases_and_odd_sizes():
    linears = [torch.nn.Linear(12, size).to(DEVICE) for size in (5, 8, 2)]
    stacked, x = fused_layers.StackedProjections(linears), torch.randn(3, 4, 12).to(DEVICE)
    module = torch.nn.ModuleList(linears)
    fast = outcome(lambda x: fused_layers._project(stacked, x)[..., :15], module, x)
    compare(fast, outcome(lambda x: torch.cat([linear(x) for linear in linears], -1), module, x), CHUNKED_FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["A", "W24", "W256"])
@pytest.mark.parametrize("learnt", [False, True])
def test_attention(name, learnt):
    """In bf16, against the same mixer in fp32: both round, and neither is the other's truth."""
    model = decoder(name, head_dim=64)
    chunk = chunk_of(model, Batch(torch.zeros(2, 130, dtype=torch.int64)))
    mixer, x = model.layers[0].self_attn.requires_grad_(learnt), torch.randn(2, 130, 48).cuda()
    slow = outcome(lambda x: mixer(x, chunk), mixer, x)
    mixer = mixer.to(torch.bfloat16)
    assert fused_layers.takes_flash(mixer, x.bfloat16(), chunk)
    compare(outcome(lambda x: fused_layers.mix(mixer, x, chunk), mixer, x.bfloat16()), slow, 2 * BF16)
    with torch.no_grad():
        again = fused_layers.mix(mixer, x.bfloat16(), chunk)
    assert relative_rmse(again.float(), slow["output"]) < 2 * BF16


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


def test_documents_are_not_for_flash():
    model = decoder("A")
    chunk = chunk_of(model, Batch(torch.zeros(2, 70, dtype=torch.int64), AGES))
    assert isinstance(chunk.documents, Documents)
    assert not fused_layers.takes_flash(model.layers[0].self_attn, torch.zeros(2, 70, 48), chunk)
