"""Every registered mixer by the kernels of each phase against its plain form: training, prompts, steps."""

import pytest
import torch
from stream_cases import DEVICE, compare, decoder, needs_triton, outcome, plain
from tolerances import CACHE_FP32, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

from nasbench.model import MIXERS
from nasbench.model.documents import Documents

__all__ = ["plain"]
pytestmark = needs_triton
AGES = torch.tensor([[*range(30), *range(40)]], dtype=torch.int32)
NAMES = [name if name != "W" else "W24" for name in MIXERS]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_training(name, documents, plain):
    model = decoder(name, num_heads=2)
    layer, meta = model.layers[0], model.sequence_meta(0, 70, Documents(AGES.to(DEVICE)) if documents else None)
    x = torch.randn(1, 70, 48).to(DEVICE)
    slow = plain(lambda: outcome(lambda x: layer(x, meta), layer, x))
    compare(outcome(lambda x: layer(x, meta), layer, x), slow, GRADIENT_FP32)
    with torch.no_grad():
        before = x.clone()
        assert relative_rmse(layer(x, meta), slow["output"]) < CHUNKED_FP32
        assert torch.equal(x, before), "a layer leaves its input as it is"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_prompts_and_steps(name, batch, plain):
    """Two chunks, then steps at equal and at own positions."""
    model = decoder(name, num_heads=2)
    text = torch.randint(0, 97, (batch, 30), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = plain(lambda: model(text))
    cache = model.new_cache(batch, 32)
    parts = [model(part, cache) for part in text[:, :28].split([17, 11], 1)]
    parts.append(model.step(text[:, 28], cache)[:, None])
    parts.append(model.step_at(text[:, 29], torch.full((batch,), 29, device=DEVICE), cache)[:, None])
    assert relative_rmse(torch.cat(parts, 1), wanted) < CACHE_FP32
