"""What every layer kind promises (nasbench.model.block), held by every registered one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_cases import (
    PLAIN,
    SHAPES,
    build,
    chunk,
    in_chunks,
    inputs,
    learners,
    names,
    new_cache,
    step,
    stepwise,
    whole,
)
from safetensors.torch import load_file, save_file
from tolerances import BF16, CACHE_FP32, relative_rmse

from nasbench.model import mixer_spec
from nasbench.model.mixers.attention.mixer import FullAttention

NAMES, LEARNERS = names(), learners()
CASES = [(name, shape) for name in NAMES for shape in SHAPES]
LEARNING_CASES = [(name, shape) for name in LEARNERS for shape in SHAPES]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_parameters_and_cache_bytes_are_the_configurations(name, shape):
    config = mixer_spec(name, SHAPES[shape])
    mixer = config.build()
    assert sum(parameter.numel() for parameter in mixer.parameters()) == config.parameters()
    for batch, context, dtype in ((1, 5, torch.float32), (3, 50, torch.bfloat16)):
        cache = new_cache(mixer, batch, context, dtype)
        assert cache.nbytes == config.cache_bytes(batch, context, dtype.itemsize)
        assert cache.conv_state_nbytes == config.conv_state_bytes(batch, dtype.itemsize)


@pytest.mark.parametrize(("name", "shape"), LEARNING_CASES)
@torch.no_grad()
def test_outputs_never_depend_on_later_tokens(name, shape):
    mixer = build(name, SHAPES[shape])
    x = inputs(mixer.spec, 2, 21)
    changed = x.clone()
    changed[:, 13:] += 1.0
    before, after = whole(mixer, x), whole(mixer, changed)
    assert relative_rmse(after[:, :13], before[:, :13]) < 1e-6
    assert relative_rmse(after[:, 13:], before[:, 13:]) > 1e-3


@pytest.mark.parametrize(("name", "shape"), CASES)
@torch.no_grad()
def test_whole_chunks_and_steps_agree(name, shape):
    mixer = build(name, SHAPES[shape])
    x = inputs(mixer.spec, 2, 23)
    expected = whole(mixer, x)
    for sizes in ([23], [5, 1, 10], [1], [9, 9]):
        cache = new_cache(mixer, 2, 23)
        got = in_chunks(mixer, x, sizes, cache)
        if sum(sizes) < 23:
            got = torch.cat((got, stepwise(mixer, x, sum(sizes), cache)), dim=1)
        assert relative_rmse(got, expected) < CACHE_FP32, sizes


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3), steps=st.integers(0, 3), name=st.sampled_from(NAMES))
@torch.no_grad()
def test_any_chunk_sizes_agree(sizes, steps, name):
    mixer = build(name)
    tokens = sum(sizes) + steps
    x, cache = inputs(mixer.spec, 1, tokens), new_cache(mixer, 1, tokens)
    got = in_chunks(mixer, x, sizes, cache)
    if steps:
        got = torch.cat((got, stepwise(mixer, x, sum(sizes), cache)), dim=1)
    assert relative_rmse(got, whole(mixer, x)) < CACHE_FP32


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_sequence_decodes_at_its_own_position(name):
    """Two sequences of 9 and 4 tokens in one batch, whose cache says nothing of the shorter one's end."""
    mixer = build(name)
    x = inputs(mixer.spec, 2, 16)
    lengths = (9, 4)
    caches = [new_cache(mixer, 1, 16) for _ in lengths]
    for row, length in enumerate(lengths):
        in_chunks(mixer, x[row : row + 1], [length], caches[row])
    both = new_cache(mixer, 2, 16)
    for name_, tensor in (*both.state.items(), *both.conv_state.items()):
        parts = [(cache.state | cache.conv_state)[name_] for cache in caches]
        tensor.copy_(torch.cat(parts))
    for t in range(7):
        positions = torch.tensor([length + t for length in lengths])
        tokens = torch.stack([x[row, position] for row, position in enumerate(positions)])[:, None]
        got = mixer(tokens, step(positions, 16, equal_lengths=False), both)
        expected = [
            mixer(tokens[row : row + 1], step(positions[row : row + 1], length + t + 1, True), caches[row])
            for row, length in enumerate(lengths)
        ]
        assert relative_rmse(got, torch.cat(expected)) < CACHE_FP32


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_reset_cache_is_a_new_one(name):
    mixer = build(name)
    x, cache = inputs(mixer.spec, 2, 9), new_cache(mixer, 2, 12)
    cache.fill_random()
    assert all(tensor.abs().sum() > 0 for tensor in (*cache.state.values(), *cache.conv_state.values()))
    assert torch.isfinite(stepwise(mixer, x, 8, cache)).all()
    cache.reset()
    assert relative_rmse(in_chunks(mixer, x, [9], cache), whole(mixer, x)) < CACHE_FP32


@pytest.mark.parametrize(("name", "shape"), LEARNING_CASES)
def test_gradients_reach_every_parameter_and_the_input(name, shape):
    mixer = build(name, SHAPES[shape])
    x = inputs(mixer.spec, 2, 12).requires_grad_()
    whole(mixer, x).square().sum().backward()
    for label, tensor in (("input", x), *mixer.named_parameters()):
        assert tensor.grad is not None, label
        # W1 sees one key, whose softmax is 1 whatever query and key are.
        if name != "W1" or not label.startswith(("q_", "k_")):
            assert tensor.grad.abs().sum() > 0, label
        assert torch.isfinite(tensor.grad).all(), label


@pytest.mark.parametrize("name", LEARNERS)
def test_fresh_mixers_train(name):
    """Zero-initialised parts get a gradient at once or after one step of plain gradient descent."""
    torch.manual_seed(0)
    mixer = mixer_spec(name, PLAIN).build()
    seen = set()
    for _ in range(2):
        mixer.zero_grad()
        whole(mixer, inputs(mixer.spec, 2, 12)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in mixer.parameters())
        seen |= {label for label, parameter in mixer.named_parameters() if parameter.grad.abs().sum() > 0}
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.sub_(0.1 * parameter.grad)
    unreachable = {label for label, _ in mixer.named_parameters() if name == "W1" and label.startswith(("q_", "k_"))}
    assert seen | unreachable == {label for label, _ in mixer.named_parameters()}


@pytest.mark.parametrize(("name", "shape"), CASES)
@torch.no_grad()
def test_starting_from_attention_copies(name, shape):
    attention = build("A", SHAPES[shape], seed=3)
    config = mixer_spec(name, SHAPES[shape])
    mixer = config.block_class().init_from_attention(config, attention)
    assert isinstance(mixer, config.block_class())
    x = inputs(config, 2, 12)
    assert torch.isfinite(whole(mixer, x)).all()
    before = {label: tensor.clone() for label, tensor in attention.state_dict().items()}
    for parameter in mixer.parameters():
        parameter.add_(1.0)
    assert all(torch.equal(tensor, before[label]) for label, tensor in attention.state_dict().items())


@pytest.mark.parametrize("name", ["A", "W32"])
@torch.no_grad()
def test_attention_kinds_start_equal_to_their_source(name):
    attention = build("A", SHAPES["one-kv"], seed=3)
    config = mixer_spec(name, SHAPES["one-kv"])
    mixer = config.block_class().init_from_attention(config, attention)
    assert isinstance(mixer, FullAttention)
    x = inputs(config, 2, 20)
    assert relative_rmse(whole(mixer, x), whole(attention, x)) < CACHE_FP32


@pytest.mark.parametrize("name", LEARNERS)
@torch.no_grad()
def test_weights_survive_a_file(name, tmp_path):
    mixer, other = build(name), build(name, seed=5)
    x = inputs(mixer.spec, 1, 9)
    expected = whole(mixer, x)  # also moves the projections into one matrix, which the file must not notice
    save_file(mixer.state_dict(), tmp_path / "mixer.safetensors")
    assert relative_rmse(whole(other, x), expected) > 1e-3
    other.load_state_dict(load_file(tmp_path / "mixer.safetensors"))
    assert torch.equal(whole(other, x), expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision_stays_close(name):
    mixer = build(name)
    x = inputs(mixer.spec, 2, 20)
    expected = whole(mixer, x)
    mixer.to(torch.bfloat16)
    cache = new_cache(mixer, 2, 20, torch.bfloat16)
    x = x.bfloat16()
    got = torch.cat((in_chunks(mixer, x, [7, 6], cache), stepwise(mixer, x, 13, cache)), dim=1)
    assert got.dtype == torch.bfloat16
    assert relative_rmse(got, expected) < BF16


@pytest.mark.parametrize("name", NAMES)
def test_some_parameters_stay_fp32_in_a_half_precision_model(name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = mixer_spec(name, PLAIN).build()
    finally:
        torch.set_default_dtype(before)
    for built in (mixer, mixer_spec(name, PLAIN).build().to(torch.bfloat16)):
        kinds = {label: parameter.dtype for label, parameter in built.named_parameters()}
        assert all((kinds[label] == torch.float32) == (label in built.fp32_parameters) for label in kinds)


@pytest.mark.parametrize("name", LEARNERS)
def test_costs_are_positive_and_grow(name):
    config = mixer_spec(name, PLAIN)
    assert 0 < config.flops(1, 0) <= config.flops(1, 63)
    assert config.flops(64, 0) == pytest.approx(sum(config.flops(1, t) for t in range(64)))
    assert config.decode_bytes(2, 64) > config.decode_bytes(1, 64) > config.parameters()
    assert math.isfinite(config.cache_bytes(4, 1 << 20))


def test_chunk_helper_stands_where_it_says():
    assert torch.equal(chunk(3, 2).rotary(PLAIN)[0], chunk(0, 5).rotary(PLAIN)[0][3:])
