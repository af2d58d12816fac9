"""Placements: the grammar, its canonical form, and the uniform baseline."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasbench.core.errors import UserError
from nasbench.spaces.placement import (
    format_placement,
    is_of,
    parse_placement,
    split_name,
)
from nasbench.spaces.space import Space, count_full, full_layers

NAMES = st.sampled_from(["A", "W", "J", "G", "W1152", "J@12x96x256"])


def test_jet_nemotron_2b():
    placement = parse_placement("14J A 4J A 2W 6J", 28)
    assert placement == parse_placement("14JA4JA2W6J")
    assert full_layers(placement) == {14, 19}
    assert [i for i, name in enumerate(placement) if name == "W"] == [20, 21]
    assert format_placement(placement) == "14J A 4J A 2W 6J"


@given(st.lists(NAMES, min_size=1, max_size=60))
def test_format_then_parse_is_identity(layers):
    assert parse_placement(format_placement(tuple(layers)), len(layers)) == tuple(layers)


def test_a_number_before_a_letter_always_repeats():
    assert parse_placement("2W6J") == ("W",) * 2 + ("J",) * 6
    assert parse_placement("2W1152 J") == ("W1152", "W1152", "J")
    assert parse_placement("W1152,J@12x96x256") == ("W1152", "J@12x96x256")
    assert [split_name(name) for name in ("J@12x96x256", "W64", "W")] == [("J", "12x96x256"), ("W", "64"), ("W", "")]
    assert is_of("W64", ("W", "J"))
    assert not is_of("W64", "AJ")


@pytest.mark.parametrize("text", ["", "  ", "a", "3", "A-J", "0A", "2", "J@", "A?", "99999999A"])
def test_bad_text_is_one_line(text):
    with pytest.raises(UserError) as caught:
        parse_placement(text)
    assert "\n" not in str(caught.value)


def test_wrong_layer_count_names_both():
    with pytest.raises(UserError, match="has 27 layers, the model has 28"):
        parse_placement("27A", 28)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_exactly_k_layers_are_spread_evenly(shape):
    layers, k = shape
    chosen = sorted(Space.uniform(layers, ("A", "J")).evenly(k))
    assert len(chosen) == k
    assert all(0 <= layer < layers for layer in chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_more_layers_than_there_are_cannot_be_spread():
    with pytest.raises(UserError, match="choose 0 to 4"):
        Space.uniform(4, ("A", "J")).evenly(5)


def test_space_keeps_the_original_first_and_checks():
    space = Space.uniform(3, ("J", "W", "A", "J"))
    assert space.choices[0] == ("A", "J", "W")
    assert space.original == ("A", "A", "A")
    assert space.alternatives(0) == space.efficient(0) == ("J", "W")
    assert space.with_full_attention(("J", "J", "W"), frozenset({1})) == ("J", "A", "W")
    with pytest.raises(UserError, match="layer kind at layer 2"):
        space.check(("A", "J", "G"))
    with pytest.raises(UserError, match="choose 0 to 3"):
        space.check_full_attention(4)


def test_a_space_around_a_model_with_windows():
    """K counts the layers that keep full attention; a window that the model itself has is no alternative to train."""
    space = Space.around(("W512", "W512", "A", "W512", "A"), ("A", "J", "W512"))
    assert space.choices == (("W512", "J"), ("W512", "J"), ("A", "J", "W512"), ("W512", "J"), ("A", "J", "W512"))
    assert [space.alternatives(i) for i in (0, 2)] == [("J",), ("J", "W512")]
    assert space.efficient(0) == ("W512", "J")
    assert space.efficient_names == ("W512", "J")
    assert space.may_be_full == (2, 4)
    assert [space.evenly(k) for k in range(3)] == [frozenset(), frozenset({4}), frozenset({2, 4})]
    assert count_full(space.original) == 2
    assert space.homogeneous("J") == ("J",) * 5
    assert space.without_full(("J", "W512")) == [("J",) * 5, ("W512",) * 5]
    assert space.without(["W512"]).choices == (("W512", "J"), ("W512", "J"), ("A", "J"), ("W512", "J"), ("A", "J"))
    with pytest.raises(UserError, match="3 full-attention layers asked of 2"):
        space.check_full_attention(3)


def test_a_bare_letter_is_the_only_kind_of_it():
    space = Space.uniform(3, ("A", "W256", "J", "G@1x2x4", "G@1x2x8"))
    assert space.check(("W", "A", "J")) == ("W256", "A", "J")
    for name in ("G", "W128", "R"):
        with pytest.raises(UserError, match=f"unknown layer kind at layer 1 '{name}'"):
            space.check(("A", name, "A"))
