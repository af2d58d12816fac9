"""A fifth kind, installed as another package would install it: a module and a .dist-info folder with an entry point."""

import importlib
import sys

import pytest
import torch
from mixer_cases import PLAIN, build, in_chunks, inputs, new_cache, stepwise, whole
from tolerances import CACHE_FP32, relative_rmse

from nasbench.core.errors import UserError
from nasbench.model import MIXERS, mixer_spec

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from nasbench.model.spec import MixerSpec, parse_ints
from nasbench.model.block import Block, BlockCache
from nasbench.model.packed import PackedProjections


@dataclass(frozen=True)
class MeanConfig(MixerSpec):
    """Z: the mean of every value so far, through a bottleneck."""

    width: int = 8
    kind: ClassVar[str] = "Z"
    title: ClassVar[str] = "running mean"

    @classmethod
    def parse(cls, shape, args):
        return cls(shape, *parse_ints("Z", args or "8", ("width",)))

    @property
    def args(self):
        return str(self.width)

    def cache_bytes(self, batch, context, dtype_bytes=2):
        return batch * (self.width + 1) * 4

    def parameters(self):
        return 2 * self.shape.hidden_size * self.width

    def flops(self, tokens, context):
        return 2 * tokens * self.parameters()

    @classmethod
    def block_class(cls):
        return Mean


class Mean(Block):
    def __init__(self, spec):
        super().__init__(spec)
        self.v_proj = nn.Linear(spec.shape.hidden_size, spec.width, bias=False)
        self.o_proj = nn.Linear(spec.width, spec.shape.hidden_size, bias=False)
        self.packed = PackedProjections((self.v_proj,))

    @property
    def out(self):
        return self.o_proj

    def new_cache(self, batch, context, *, device, dtype):
        shape = (batch, self.spec.width + 1)
        return BlockCache(context, {"sum": torch.zeros(shape, device=device, dtype=torch.float32)})

    def core(self, row, meta, cache=None):
        v = row.float()
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        total = v.cumsum(1)
        if cache is not None:
            total = total + cache.state["sum"][:, None]
            cache.state["sum"].copy_(total[:, -1])
        return (total[..., :-1] / total[..., -1:]).to(row.dtype)

    @classmethod
    def init_from_attention(cls, spec, attention):
        weight = attention.v_proj.weight
        mixer = cls(spec).to(weight.device, weight.dtype)
        with torch.no_grad():
            mixer.v_proj.weight.copy_(weight[: spec.width])
        return mixer
'''


@pytest.fixture
def fifth_kind(tmp_path, monkeypatch):
    """Installs the package for one test, with a registry that has not looked at entry points yet."""
    (tmp_path / "running_mean_blocks.py").write_text(MODULE)
    info = tmp_path / "running_mean_blocks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: running-mean-blocks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nasbench.blocks]\nZ = running_mean_blocks:MeanConfig\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(MIXERS, "_items", dict(MIXERS._items))
    monkeypatch.setattr(MIXERS, "_discovered", False)
    importlib.invalidate_caches()
    yield info
    sys.modules.pop("running_mean_blocks", None)


def test_an_installed_kind_is_one_of_the_kinds(fifth_kind):
    assert "Z" in list(MIXERS)
    assert mixer_spec("Z", PLAIN).args == "8"
    assert mixer_spec("Z4", PLAIN).parameters() == 2 * PLAIN.hidden_size * 4


@torch.no_grad()
def test_an_installed_kind_keeps_the_contract(fifth_kind):
    mixer = build("Z")
    x = inputs(mixer.spec, 2, 11)
    cache = new_cache(mixer, 2, 11)
    assert cache.nbytes == mixer.spec.cache_bytes(2, 11)
    got = torch.cat((in_chunks(mixer, x, [4, 3], cache), stepwise(mixer, x, 7, cache)), dim=1)
    assert relative_rmse(got, whole(mixer, x)) < CACHE_FP32
    started = mixer.spec.block_class().init_from_attention(mixer.spec, build("A"))
    assert torch.isfinite(whole(started, x)).all()


def test_a_broken_installed_kind_is_named(fifth_kind):
    (fifth_kind / "entry_points.txt").write_text("[nasbench.blocks]\nZ = running_mean_blocks:Nothing\n")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"'Z'.*running_mean_blocks:Nothing"):
        list(MIXERS)


def test_a_letter_cannot_be_taken_twice(fifth_kind):
    (fifth_kind / "entry_points.txt").write_text("[nasbench.blocks]\nA = running_mean_blocks:MeanConfig\n")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="'A' is already registered"):
        list(MIXERS)
