"""A recurrent state in bf16: half the cache, and close to the state in fp32."""

import pytest
import torch
from mixer_cases import PLAIN, build, in_chunks, inputs, new_cache
from tolerances import BF16, relative_rmse

from nasbench.core.errors import UserError
from nasbench.model import mixer_spec


@pytest.mark.parametrize("kind", ["J", "G"])
def test_arguments(kind):
    narrow, wide = (mixer_spec(f"{kind}@2x4x24{bits}", PLAIN) for bits in ("x16", "x32"))
    assert (narrow.args, wide.args) == ("2x4x24x16", "2x4x24")
    assert 2 * narrow.cache_bytes(3, 100) == wide.cache_bytes(3, 100)
    assert 2 * narrow.traffic_bytes(3, 100) - wide.traffic_bytes(3, 100) == 2 * wide.conv_state_bytes(3)
    with pytest.raises(UserError, match=r"2x4x24x8.*32 bits.*16"):
        mixer_spec(f"{kind}@2x4x24x8", PLAIN)


@pytest.mark.parametrize("kind", ["J", "G"])
@torch.no_grad()
def test_chunks_and_steps_stay_close_to_an_fp32_state(kind):
    outputs = []
    for bits in (16, 32):
        mixer = build(f"{kind}@3x16x16x{bits}")
        cache = new_cache(mixer, 2, 60)
        assert cache.state["state"].nbytes == mixer.spec.cache_bytes(2, 60)
        outputs.append(in_chunks(mixer, inputs(mixer.spec, 2, 60), [33, *[1] * 27], cache))
    assert 0.0 < relative_rmse(*outputs) < BF16
