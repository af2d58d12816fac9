"""Kinds that are full attention on short texts say up to where."""

import math

import pytest
import torch
from mixer_cases import PLAIN, chunk, inputs, names

from nasbench.model import mixer_spec


@pytest.mark.parametrize("name", [name for name in names() if name not in ("A", "W")])
def test_every_kind_is_full_attention_as_long_as_it_says(name):
    """With the attention's weights, up to that many tokens and no further; a kind of 0 never is, or has its own."""
    torch.manual_seed(0)
    attention, spec = mixer_spec("A", PLAIN).build(), mixer_spec(name, PLAIN)
    mixer = spec.block_class().init_from_attention(spec, attention)
    assert attention.spec.exact_until == math.inf

    def differs(tokens):
        x = inputs(spec, 2, tokens)
        with torch.no_grad():
            ours, theirs = mixer(x, chunk(0, tokens)), attention(x, chunk(0, tokens))
        return not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    until = int(spec.exact_until)
    assert not until or not differs(until)
    # H starts as its window alone: its own weights make the difference.
    assert differs(until + 1 if until else 3) or (not until and spec.parameters() > attention.spec.parameters())
