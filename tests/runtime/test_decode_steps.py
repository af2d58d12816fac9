"""On a CUDA GPU: the decode streams equal the plain decoder's, at any batch, from any cache, captured or not."""

import copy

import pytest
import torch
from tolerances import BF16, CACHE_FP32, relative_rmse

from nasbench.checkpoints.load import random_decoder
from nasbench.model.shapes import ModelSpec
from nasbench.runtime.generate import prefill
from nasbench.runtime.graph import Stepper
from nasbench.spaces.placement import parse_placement

pytestmark = pytest.mark.gpu

SHAPES = [
    ModelSpec(
        "bias", "qwen2", 4, 256, 528, 8, 2, 64, 1024, 4096, 10_000.0, 1e-6, qkv_bias=True, defaults=(("W", "48"),)
    ),
    ModelSpec(
        "norms", "qwen3", 4, 192, 400, 6, 3, 96, 513, 4096, 1e6, 1e-6, qk_norm=True, tie_embeddings=False,
        defaults=(("W", "48"), ("J", "3x24x40")),
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products in fp32, not tf32: the comparison is with the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("placement", ["A W J G", "4A", "4J", "4G", "4W"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@torch.inference_mode()
def test_steps_after_an_odd_prefill_equal_the_cpu(shape, placement, batch):
    cpu = random_decoder(shape, parse_placement(placement, 4), device="cpu", seed=3)
    gpu = copy.deepcopy(cpu).cuda()
    text = torch.randint(shape.vocab_size, (batch, 133), generator=torch.Generator().manual_seed(0))
    wanted = cpu(text)
    cache = gpu.new_cache(batch, 160)
    prefill(gpu, text[:, :77].cuda(), cache, 33)
    gpu.prepare(160)
    ours = [
        gpu.step_at(text[:, t].cuda(), torch.full((batch,), t, device="cuda"), cache).clone() for t in range(77, 133)
    ]
    assert relative_rmse(torch.stack(ours, 1).cpu(), wanted[:, 77:]) < CACHE_FP32


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_bf16_over_256_captured_tokens(batch):
    shape = SHAPES[0]
    cpu = random_decoder(shape, parse_placement("A W J G", 4), device="cpu", seed=3)
    gpu = copy.deepcopy(cpu).to("cuda", torch.bfloat16)
    text = torch.randint(shape.vocab_size, (batch, 333), generator=torch.Generator().manual_seed(1))
    wanted = cpu.to(torch.bfloat16).float()(text)  # the same rounded weights, exact arithmetic
    cache = gpu.new_cache(batch, 400)
    stepper = Stepper(gpu, cache)
    prefill(gpu, text[:, :77].cuda(), cache, 33)
    ours = [stepper.step(text[:, t].cuda()).clone() for t in range(77, 333)]
    assert relative_rmse(torch.stack(ours, 1).float().cpu(), wanted[:, 77:]) < 2 * BF16
    assert cache.length == 333


@pytest.mark.parametrize("batch", [1, 3, 100])
@torch.inference_mode()
def test_launches_that_overlap_change_nothing(batch):
    """Bit by bit over captured steps, each of the token that the one before chose."""
    from contextlib import nullcontext

    from nasbench_kernels.common.pdl import without_pdl

    decoder = random_decoder(SHAPES[0], parse_placement("A W J G", 4), dtype=torch.bfloat16, device="cuda", seed=3)
    text = torch.randint(SHAPES[0].vocab_size, (batch, 77), generator=torch.Generator().manual_seed(2)).cuda()

    def written(overlap) -> torch.Tensor:
        cache = decoder.new_cache(batch, 160)
        with overlap:
            stepper = Stepper(decoder, cache)
        logits = prefill(decoder, text, cache, 33)
        kept = []
        for _ in range(60):
            logits = stepper.step(logits.argmax(-1))
            kept.append(logits.clone())
        return torch.stack(kept)

    assert torch.equal(written(nullcontext()), written(without_pdl()))
