"""What only a CUDA device can show of Mamba2's kernels: half-precision products and capture in a graph."""

import pytest
import torch
from nasbench_kernels.mamba2 import naive_mamba2
from tolerances import BF16, relative_rmse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "dim", "groups", "size"), [(5, 64, 1, 128), (4, 48, 2, 64), (2, 128, 1, 256)])
def test_prompt_kernel_agrees_with_the_truth(heads, dim, groups, size, dtype):
    from nasbench_kernels.mamba2.prefill import triton_mamba2

    x, b = draw(2, 300, heads, dim, dtype=dtype), draw(2, 300, groups, size, dtype=dtype, seed=1) / size**0.5
    c, dt = draw(2, 300, groups, size, dtype=dtype, seed=2), draw(2, 300, heads).abs()
    case = (x, dt, -dt * draw(heads).exp(), b, c, draw(heads), draw(2, heads, dim, size))
    for got, expected in zip(triton_mamba2(*case), naive_mamba2(*case), strict=True):
        assert relative_rmse(got, expected) < BF16


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "dim", "groups", "size"), [(3, 8, 64, 1, 128), (64, 24, 64, 2, 64)])
def test_a_captured_step_replays_as_it_runs(batch, heads, dim, groups, size, kind):
    from nasbench_kernels.mamba2.decode import fused_mamba2_step

    inner, channels = heads * dim, heads * dim + 2 * groups * size
    row = draw(batch, inner + channels + heads, dtype=torch.bfloat16)
    weights = draw(channels, 4, dtype=torch.bfloat16), draw(channels, dtype=torch.bfloat16)
    gates, norm = [draw(heads, seed=i) for i in range(3)], draw(inner, dtype=torch.bfloat16)
    start = draw(batch, 3, channels, dtype=torch.bfloat16), draw(batch, heads, dim, size, dtype=kind)

    def step(memory):
        return fused_mamba2_step(row, *weights, *memory, *gates, norm, eps=1e-5)

    plain, captured = [[tensor.clone() for tensor in start] for _ in range(2)]
    expected = [step(plain) for _ in range(3)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(captured)
    for ours, theirs in zip(captured, start, strict=True):
        ours.copy_(theirs)
    for wanted in expected:
        graph.replay()
        assert torch.equal(got, wanted)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, plain, strict=True))
