"""Packing projections must be invisible except in time."""

import copy

import pytest
import torch
from mixer_cases import SHAPES, build, inputs, learners, whole
from torch import nn

from nasbench.model.packed import PackedProjections


@pytest.fixture
def linears():
    torch.manual_seed(0)
    return [nn.Linear(8, size) for size in (4, 6, 2)]


def outputs(packed, x):
    return torch.cat(tuple(packed.split(packed(x))), -1)


def reference(linears, x):
    return torch.cat([linear(x) for linear in linears], dim=-1)


def test_one_storage_serves_all_parameters(linears):
    x, packed = torch.randn(3, 8), PackedProjections(linears)
    expected = reference(linears, x)
    with torch.no_grad():
        torch.testing.assert_close(outputs(packed, x), expected)
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    torch.testing.assert_close(outputs(packed, x), expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_training_and_replacement_are_seen(linears, guard):
    x, packed = torch.randn(3, 8), PackedProjections(linears)
    with guard():
        outputs(packed, x)
    optimizer = torch.optim.SGD([p for linear in linears for p in linear.parameters()], lr=0.5)
    outputs(packed, x).square().sum().backward()
    optimizer.step()
    with guard():
        torch.testing.assert_close(outputs(packed, x), reference(linears, x))
    linears[1].weight = nn.Parameter(torch.randn(6, 8))
    linears[2].bias.data = torch.randn(2)
    for linear in linears:
        linear.to(torch.float64)
    with guard():
        torch.testing.assert_close(outputs(packed, x.double()), reference(linears, x.double()))


@torch.no_grad()
def test_the_convolutions_of_gated_deltanet_are_packed_once():
    mixer = build("G", SHAPES["bias"])
    parts = [getattr(mixer, f"{name}_conv1d").weight for name in "qkv"]
    wanted = torch.cat(parts)[:, 0].clone()
    taps = mixer.taps()
    assert torch.equal(taps, wanted)
    assert mixer.taps().data_ptr() == taps.data_ptr()
    parts[1].add_(1)
    assert torch.equal(mixer.taps(), torch.cat(parts)[:, 0])
    assert torch.equal(mixer.to(torch.float64).taps(), torch.cat(parts)[:, 0].double())


@pytest.mark.parametrize("name", learners())
def test_a_copy_of_a_mixer_is_independent(name):
    mixer = build(name, SHAPES["bias"])
    x = inputs(mixer.spec, 1, 9)
    with torch.no_grad():
        expected = whole(mixer, x)
        other = copy.deepcopy(mixer)
        assert torch.equal(whole(other, x), expected)
        for parameter in other.parameters():
            parameter.add_(0.3)
        assert not torch.allclose(whole(other, x), expected)
        assert torch.equal(whole(mixer, x), expected)
