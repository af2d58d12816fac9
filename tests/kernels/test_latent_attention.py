"""Attention over latents against its plain form: split and whole contexts, odd sizes, more heads than a program has."""

import pytest
import torch

pytest.importorskip("triton")

from nasbench_kernels.mla import decode
from nasbench_kernels.mla.naive import naive_latent_attention
from tolerances import CACHE_FP32, relative_rmse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("heads", "latent", "rope"), [(3, 24, 6), (16, 32, 16), (20, 40, 8)])
@pytest.mark.parametrize("splits", [1, 3])
def test_equals_the_plain_form(heads, latent, rope, splits, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **rest: empty(*args, **rest).fill_(float("nan")))
    monkeypatch.setattr(decode, "num_splits", lambda *sizes: splits)
    torch.manual_seed(0)
    q = torch.randn(heads, 2, latent, device=DEVICE)
    q_rope, latents = torch.randn(2, heads, rope, device=DEVICE), torch.randn(2, 150, latent + rope, device=DEVICE)
    positions = torch.tensor([149, 110], device=DEVICE)
    got = decode.latent_attention(q, q_rope, latents, positions, 150, 0.2)
    assert relative_rmse(got, naive_latent_attention(q, q_rope, latents, positions, 0.2)) < CACHE_FP32


@pytest.mark.parametrize(
    ("programs", "length", "wanted"), [(64, 4096, 4), (256, 4096, 1), (1, 256, 2), (1, 1 << 20, 128)]
)
def test_splits_fill_two_programs_a_multiprocessor(programs, length, wanted):
    assert decode.num_splits(programs, length, 2 * 132, 32) == wanted
