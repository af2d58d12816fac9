"""What only a CUDA device can show: capture of the decode step in a graph, and the half-precision prefill path."""

import pytest
import torch
from mixer_cases import build, chunk, names, step
from tolerances import BF16, relative_rmse

from nasbench.model import LayerShape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = LayerShape(hidden_size=256, num_heads=6, num_kv_heads=2, head_dim=64, max_context=256, qkv_bias=True)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("uniform", [True, False])
@torch.inference_mode()
def test_a_captured_step_replays_as_it_runs(name, uniform):
    mixer = build(name, SHAPE).to("cuda", torch.bfloat16)
    x = torch.randn(3, 1, SHAPE.hidden_size, device="cuda", dtype=torch.bfloat16)
    positions = torch.full((3,), 63, device="cuda") if uniform else torch.tensor([63, 5, 40], device="cuda")
    caches = [mixer.new_cache(3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    caches[0].fill_random()
    start = {key: tensor.clone() for key, tensor in caches[0].tensors.items()}

    def restore(cache):
        for key, tensor in cache.tensors.items():
            tensor.copy_(start[key])

    restore(caches[1])
    expected = mixer(x, step(positions, 64, uniform), caches[1])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            mixer(x, step(positions, 64, uniform), caches[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mixer(x, step(positions, 64, uniform), caches[0])
    restore(caches[0])
    graph.replay()
    assert relative_rmse(got, expected) < 1e-3
    for key, tensor in caches[0].tensors.items():
        assert relative_rmse(tensor, caches[1].tensors[key]) < 1e-3, key


@pytest.mark.parametrize("name", names())
@torch.inference_mode()
def test_chunks_agree_with_the_cpu(name):
    mixer = build(name, SHAPE)
    x = torch.randn(2, 100, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = mixer(x, chunk(0, 100))
    mixer.to("cuda", torch.bfloat16)
    cache = mixer.new_cache(2, 100, device="cuda", dtype=torch.bfloat16)
    outputs = []
    for start, end in ((0, 33), (33, 34), (34, 100)):
        where = chunk(start, end - start, "cuda")
        outputs.append(mixer(x[:, start:end].to("cuda", torch.bfloat16), where, cache))
    assert relative_rmse(torch.cat(outputs, 1).cpu(), expected) < BF16
