"""A mixer of another package is one of the kinds."""

import importlib

import pytest
import torch
from mixer_cases import PLAIN, build, chunk, in_chunks, inputs, new_cache, stepwise, whole
from tolerances import CACHE_FP32, relative_rmse
from toy_package import toys

from nasbench.core.errors import UserError
from nasbench.model import MIXERS, mixer_spec
from nasbench.model.stream import TrainStream

__all__ = ["toys"]


def test_an_installed_kind_is_one_of_the_kinds(toys):
    assert "Z" in list(MIXERS)
    assert mixer_spec("Z", PLAIN).args == "8"
    assert mixer_spec("Z4", PLAIN).parameters() == 3 * PLAIN.hidden_size * 4


@torch.no_grad()
def test_an_installed_kind_keeps_the_contract(toys):
    mixer = build("Z")
    x = inputs(mixer.spec, 2, 11)
    cache = new_cache(mixer, 2, 11)
    assert cache.nbytes == mixer.spec.cache_bytes(2, 11)
    got = torch.cat((in_chunks(mixer, x, [4, 3], cache), stepwise(mixer, x, 7, cache)), dim=1)
    assert relative_rmse(got, whole(mixer, x)) < CACHE_FP32
    started = mixer.spec.block_class().init_from_attention(mixer.spec, build("A"))
    assert torch.isfinite(whole(started, x)).all()


def test_an_installed_kind_of_an_odd_width_trains(toys):
    mixer = build("Z3")
    x = inputs(mixer.spec, 2, 11)
    stream = TrainStream(x, residual=False)
    mixer.run(stream, None, chunk(0, 11))
    assert relative_rmse(stream.content(), whole(mixer, x)) < CACHE_FP32


def test_a_broken_installed_kind_is_named(toys):
    (toys / "entry_points.txt").write_text("[nasbench.blocks]\nZ = running_mean:Nothing\n")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"'Z'.*running_mean:Nothing"):
        list(MIXERS)


def test_a_letter_cannot_be_taken_twice(toys):
    (toys / "entry_points.txt").write_text("[nasbench.blocks]\nA = running_mean:RunningMeanSpec\n")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="'A' is already registered"):
        list(MIXERS)
