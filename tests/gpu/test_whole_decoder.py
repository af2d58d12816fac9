"""On a CUDA GPU: the same layers, decoder and stages as on the CPU, and decoding that a graph captures."""

import copy

import pytest
import torch
from nasbench_kernels.gated_delta import chunked_gated_delta, naive_gated_delta
from tolerances import BF16, CACHE_FP32, CHUNKED_FP32, relative_rmse

from nasbench.checkpoints.load import random_decoder
from nasbench.model import MIXERS
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import parse_placement

pytestmark = pytest.mark.gpu

SHAPE = ModelSpec(
    "tiny", "qwen2", 4, 256, 512, 8, 2, 64, 1024, 4096, 10_000.0, 1e-6, qkv_bias=True, qk_norm=True,
    defaults=(("W", "48"),),
)  # fmt: skip


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products in fp32, not tf32: the comparison is with the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def both(placement: str, dtype: torch.dtype = torch.float32):
    """One random decoder on the CPU and its copy on the GPU."""
    cpu = random_decoder(SHAPE, parse_placement(placement, 4), dtype=dtype, device="cpu", seed=3)
    return cpu, copy.deepcopy(cpu).to("cuda")


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SHAPE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", sorted(MIXERS))
@torch.inference_mode()
def test_forward_chunks_and_steps_equal_the_cpu(kind):
    cpu, gpu = both(f"4{kind}")
    text = tokens(2, 133)
    wanted = cpu(text)
    assert relative_rmse(gpu(text.cuda()).cpu(), wanted) < CACHE_FP32
    cache = gpu.new_cache(2, 160)
    parts = [gpu(part, cache) for part in text[:, :120].cuda().split([1, 70, 49], 1)]
    parts += [gpu.step(text[:, t].cuda(), cache)[:, None] for t in range(120, 133)]
    assert relative_rmse(torch.cat(parts, 1).cpu(), wanted) < CACHE_FP32


@pytest.mark.parametrize("kind", sorted(MIXERS))
@torch.inference_mode()
def test_bf16_stays_near_fp32(kind):
    cpu, gpu = both(f"4{kind}")
    text = tokens(2, 97, seed=1)
    # Rounding adds up over the layers, as on a CPU: one of G brings 0.019, two 0.028, three 0.036, four 0.043 (of J
    # 0.018 to 0.036, A and W 0.01), so the bound for one layer doubles, and a layer amplifies what it gets.
    assert relative_rmse(gpu.to(torch.bfloat16)(text.cuda()).float().cpu(), cpu(text)) < 2.5 * BF16


@torch.inference_mode()
def test_a_captured_step_is_the_eager_step():
    _, gpu = both("A W J G")
    text = tokens(3, 90, seed=2).cuda()
    eager, captured = gpu.new_cache(3, 128), gpu.new_cache(3, 128)
    gpu(text[:, :60], eager)
    gpu(text[:, :60], captured)
    token, position = text[:, 60].clone(), torch.full((3,), 60, device="cuda")
    kept = [{name: tensor.clone() for name, tensor in cache.tensors.items()} for cache in captured.kept]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gpu.step_at(token, position, captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = gpu.step_at(token, position, captured)
    for cache, old in zip(captured.kept, kept, strict=True):
        for name, tensor in cache.tensors.items():
            tensor.copy_(old[name])
    for t in range(60, 90):
        token.copy_(text[:, t])
        position.fill_(t)
        graph.replay()
        assert relative_rmse(logits, gpu.step(text[:, t], eager)) < CACHE_FP32


@pytest.mark.parametrize("length", [1, 63, 64, 65, 257])
def test_chunked_gated_delta_forward_and_gradients(length):
    generator = torch.Generator().manual_seed(length)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    q, k = (torch.nn.functional.normalize(draw(2, length, 3, 32), dim=-1) for _ in range(2))
    v, g, beta = draw(2, length, 3, 48), -draw(2, length, 3).exp(), draw(2, length, 3).sigmoid()
    inputs = [x.cuda().requires_grad_() for x in (q, k, v, g, beta)]
    truth = [x.cuda().requires_grad_() for x in (q, k, v, g, beta)]
    weight = draw(2, length, 3, 48).cuda()
    fast, slow = chunked_gated_delta(*inputs)[0], naive_gated_delta(*truth)[0]
    assert relative_rmse(fast, slow) < CHUNKED_FP32
    (fast * weight).sum().backward()
    (slow * weight).sum().backward()
    for name, ours, theirs in zip(("q", "k", "v", "g", "beta"), inputs, truth, strict=True):
        assert relative_rmse(ours.grad, theirs.grad) < 10 * CHUNKED_FP32, name
