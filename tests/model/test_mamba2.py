"""Mamba2: equal to transformers' mixer, what its arguments say, what it takes from an attention, its prompt path."""

import pytest
import torch
from mixer_cases import PLAIN, SHAPES, build, chunk, in_chunks, inputs, new_cache, step, stepwise, whole
from tolerances import CACHE_FP32, GRADIENT_FP32, LOGITS_FP32, relative_rmse

from nasbench.core.errors import UserError
from nasbench.model import mixer_spec
from nasbench.model.documents import Documents


@pytest.mark.parametrize(("groups", "size"), [(1, 20), (3, 8)])
@torch.no_grad()
def test_equals_transformers(groups, size):
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        num_heads=6, head_dim=16, hidden_size=48, state_size=size, n_groups=groups, expand=2, conv_kernel=4,
        num_hidden_layers=1, chunk_size=16,
    )  # fmt: skip
    ours = build(f"M@6x16x{size}x{groups}x32")
    theirs = Mamba2Mixer(config, 0).eval()
    theirs.load_state_dict(ours.state_dict())
    x = inputs(ours.spec, 2, 37)
    expected = theirs(x)
    assert relative_rmse(whole(ours, x), expected) < LOGITS_FP32
    cache = new_cache(ours, 2, 37)
    in_steps = torch.cat((in_chunks(ours, x[:, :20], [20], cache), stepwise(ours, x, 20, cache)), 1)
    assert relative_rmse(in_steps, expected) < LOGITS_FP32


def test_arguments():
    for text, groups, bits in (("80x64x128", 1, 32), ("80x64x128x16", 1, 16), ("80x64x128x8x32", 8, 32)):
        spec = mixer_spec(f"M@{text}", PLAIN)
        assert (spec.num_heads, spec.head_dim, spec.state_size) == (80, 64, 128)
        assert (spec.groups, spec.state_bits, spec.args) == (groups, bits, text)
    assert mixer_spec("M", PLAIN).args == "6x8x8x6x32"
    for text, said in (
        ("80x64", "heads"),
        ("80x64x128x8", "32 bits"),
        ("80x64x128x3x32", "3 groups"),
        ("axb", "heads"),
    ):
        with pytest.raises(UserError, match=said):
            mixer_spec(f"M@{text}", PLAIN)


def test_a_published_model_costs_what_its_paper_says():
    """Mamba2-2.7B: 64 layers whose bf16 states are 80 MiB together."""
    spec = mixer_spec("M@80x64x128x16", SHAPES["gqa"])
    assert 64 * spec.cache_bytes(1, 0) == 80 << 20
    assert spec.projected == 2 * 5120 + 2 * 128 + 80
    assert spec.conv_state_bytes(2) == 2 * 3 * (5120 + 256) * 2
    assert spec.traffic_bytes(4, 0) == 2 * (spec.cache_bytes(4, 0) + spec.conv_state_bytes(4))


@torch.no_grad()
def test_starts_from_values_keys_and_queries():
    """With one token and open gates, linear attention reads (c . b) of the attention's value."""
    attention = build("A", SHAPES["gqa"], seed=3)
    spec = mixer_spec("M", SHAPES["gqa"])
    mixer = spec.block_class().init_from_attention(spec, attention)
    _, x, b, c, _ = mixer.in_proj.weight.split((48, 48, 48, 48, 6))
    repeated = attention.v_proj.weight.unflatten(0, (2, 8)).repeat_interleave(3, 0).flatten(0, 1)
    assert torch.equal(x, repeated)
    assert torch.equal(b, attention.k_proj.weight.unflatten(0, (2, 8)).repeat_interleave(3, 0).flatten(0, 1))
    assert torch.equal(c, attention.q_proj.weight)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


@torch.no_grad()
def test_calibration_opens_the_gates_and_leaves_the_rest():
    mixer = build("M")
    before = mixer.in_proj.weight.clone()
    constant = torch.linspace(-1, 1, 48, dtype=torch.float64)
    after = mixer.calibration(constant)["in_proj.weight"]
    assert relative_rmse(after[:48] @ constant.float(), torch.full((48,), 2 * float(constant @ constant))) < 1e-5
    assert torch.equal(after[48:], before[48:])
    assert torch.equal(mixer.in_proj.weight, before)


@torch.no_grad()
def test_half_precision_leaves_the_decays_alone():
    mixer = build("M").to(torch.bfloat16)
    kept = {name for name, parameter in mixer.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias", "D"}
    assert mixer.new_cache(1, 4, device="cpu", dtype=torch.bfloat16).state["state"].dtype == torch.float32


@pytest.mark.parametrize("name", ["M", "M@4x12x20x2x32"])
@torch.no_grad()
def test_gpu_bodies_equal_the_plain_one(name):
    """The prompt's and the decode step's kernels, here in the interpreter, with documents and a cache."""
    pytest.importorskip("triton")
    mixer = build(name)
    x = inputs(mixer.spec, 2, 19)
    documents = Documents(torch.cat([torch.arange(7), torch.arange(12)])[None].expand(2, -1))
    row = mixer.packed(x)
    for held in (None, documents):
        meta = chunk(0, 19, documents=held)
        assert relative_rmse(mixer.prefill_core(row, meta), mixer.core(row, meta)) < CACHE_FP32
    caches = [new_cache(mixer, 2, 30) for _ in range(2)]
    for start, end in ((0, 12), (12, 14)):
        meta, part = chunk(start, end - start), row[:, start:end].contiguous()
        expected = mixer.core(part, meta, caches[0])
        assert relative_rmse(mixer.prefill_core(part, meta, caches[1]), expected) < CACHE_FP32
    for t in range(14, 17):
        step_meta = step(torch.full((2,), t), t + 1, True)
        expected = mixer.core(row[:, t, None], step_meta, caches[0])[:, 0]
        assert (
            relative_rmse(mixer.decode_core(row[:, t].contiguous(), step_meta, caches[1], None), expected) < CACHE_FP32
        )
    for key, tensor in caches[0].tensors.items():
        assert relative_rmse(caches[1].tensors[key], tensor) < CACHE_FP32, key


def test_training_body_equals_the_plain_one():
    pytest.importorskip("triton")
    mixer = build("M@4x12x20x2x32")
    x = inputs(mixer.spec, 1, 19)
    meta = chunk(0, 19, documents=Documents(torch.cat([torch.arange(7), torch.arange(12)])[None]))
    gradients = []
    for body in (mixer.core, mixer.train_core):
        mixer.zero_grad()
        body(mixer.packed(x), meta).square().sum().backward()
        gradients.append(
            {key: parameter.grad.clone() for key, parameter in mixer.named_parameters() if parameter.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert relative_rmse(gradients[1][key], gradient) < GRADIENT_FP32, key
