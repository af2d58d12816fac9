"""On a CUDA GPU: details of families beside Llama's form compute what they compute on a CPU."""

import copy
from dataclasses import replace

import pytest
import torch
from tolerances import CACHE_FP32, relative_rmse

from nasbench.checkpoints.load import random_decoder
from nasbench.model.shapes import ModelSpec

pytestmark = pytest.mark.gpu

PLAIN = ModelSpec("tiny", "llama", 3, 256, 512, 8, 2, 64, 1024, 4096, 10_000.0, 1e-6, published_placement="2A W48")
DETAILS = {
    "smollm3, yarn": {"no_rope": (1, 2), "rope_scaling": ("yarn", 1.1, 4.0, 32.0, 1.0, 64.0, 1.0)},
    "phi3, dynamic": {"rotary_dim": 48, "rope_scaling": ("dynamic", 4.0, 64.0)},
    "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": True, "wide_qk_norm": True},
    "gemma3": {
        "post_norms": True, "qk_norm": True, "embedding_scale": 16.0, "window_rope_theta": 500.0,
        "activation": "gelu_tanh",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DETAILS)
@torch.inference_mode()
def test_chunks_and_steps_equal_the_cpu(name, monkeypatch):
    """At batch 1 and 3, which have kernels of their own: few tokens, since compiling takes longest."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    spec = replace(PLAIN, **DETAILS[name])
    cpu = random_decoder(spec, spec.placement, seed=3)
    gpu = copy.deepcopy(cpu).to("cuda")
    text = torch.randint(1024, (3, 124), generator=torch.Generator().manual_seed(0))

    def read(decoder, batch):
        ids, cache = text[:batch].to(decoder.device), decoder.new_cache(batch, 160)
        parts = [decoder(part, cache) for part in ids[:, :120].split([1, 70, 49], 1)]
        parts += [decoder.step(ids[:, t], cache)[:, None] for t in range(120, 124)]
        return decoder(ids).cpu(), torch.cat(parts, 1).cpu()

    for batch in (1, 3):
        for how, wanted, found in zip(("whole", "cached"), read(cpu, batch), read(gpu, batch), strict=True):
            error = relative_rmse(found, wanted)
            assert error <= CACHE_FP32, f"{name}, batch {batch}, {how}: {error:.2e}"
