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
    "smollm3": {"no_rope": (1, 2)},
    "phi3": {"rotary_dim": 48},
    "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": True, "wide_qk_norm": True},
    "yarn": {"rope_scaling": ("yarn", 1.1, 4.0, 32.0, 1.0, 64.0, 1.0)},
    "dynamic": {"rope_scaling": ("dynamic", 4.0, 64.0)},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", DETAILS)
@torch.inference_mode()
def test_chunks_and_steps_equal_the_cpu(name, batch, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    spec = replace(PLAIN, **DETAILS[name])
    cpu = random_decoder(spec, spec.placement, seed=3)
    gpu = copy.deepcopy(cpu).to("cuda")
    text = torch.randint(1024, (batch, 133), generator=torch.Generator().manual_seed(0))
    results = []
    for decoder in (cpu, gpu):
        ids, cache = text.to(decoder.device), decoder.new_cache(batch, 160)
        parts = [decoder(part, cache) for part in ids[:, :120].split([1, 70, 49], 1)]
        parts += [decoder.step(ids[:, t], cache)[:, None] for t in range(120, 133)]
        results.append((decoder(ids).cpu(), torch.cat(parts, 1).cpu()))
    for how, wanted, found in zip(("whole", "cached"), *results, strict=True):
        error = relative_rmse(found, wanted)
        assert error <= CACHE_FP32, f"{name}, {how}: {error:.2e}"
