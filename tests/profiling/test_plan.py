"""What a sweep would measure."""

import pytest

from nasbench.core.errors import UserError
from nasbench.model.shapes import MODELS
from nasbench.profiling.plan import Point, batch_limit, largest_batch, parse_batches, plan

SHAPE = MODELS["smollm2-135m"]
GIB = 1 << 30


def points(**changes) -> list[Point]:
    asked = {
        "names": ("A", "J"),
        "contexts": [1024, 8192],
        "batches": [1, 4],
        "modes": ("decode", "prefill"),
        "chunk": 512,
        "memory_bytes": 16 * GIB,
        "dtype_bytes": 4,
    }
    return [point for group in plan(SHAPE, **(asked | changes)) for point in group]


def test_every_kind_at_every_context_and_batch():
    found = points()
    assert len(found) == len(set(found))
    # A recurrent state does the same at every context.
    for name, contexts, ends in (("A", (1024, 8192), (512, 1024, 8192)), ("J", (1024,), (512,))):
        decode = {(p.context, p.batch) for p in found if p.block == name and p.mode == "decode"}
        assert decode == {(context, batch) for context in contexts for batch in (1, 4)}
        prefill = {(p.context, p.batch, p.chunk) for p in found if p.block == name and p.mode == "prefill"}
        assert prefill == {(end, 1, 512) for end in ends}
    for name in ("embedding", "norm", "mlp"):
        assert {(p.mode, p.batch) for p in found if p.block == name} == {("decode", 1), ("decode", 4), ("prefill", 1)}
    assert {(p.mode, p.batch) for p in found if p.block == "head"} == {("decode", 1), ("decode", 4)}


def test_a_window_is_measured_until_it_is_full():
    found = points(names=("W1152",), contexts=[1024, 2048, 4096, 8192])
    places = {(p.mode, p.context) for p in found if p.block == "W1152"}
    decode = {("decode", context) for context in (1024, 2048)}
    assert places == decode | {("prefill", context) for context in (512, 1024, 2048)}


def test_the_ends_come_before_what_lies_between():
    asked = {"names": ("A",), "contexts": [1024, 2048, 8192], "batches": [1, 2, 4], "modes": ("decode",)}
    decode = [(p.context, p.batch) for p in points(**asked) if p.block == "A"]
    assert decode[:4] == [(1024, 1), (1024, 4), (8192, 1), (8192, 4)]
    assert decode[-1] == (2048, 2)


def test_one_mode_only():
    assert {p.mode for p in points(modes=("decode",))} == {"decode"}
    # Prefill ends with one head.
    assert {p.block for p in points(modes=("prefill",)) if p.mode == "decode"} == {"head"}


def test_a_group_is_one_kind_in_one_mode_and_prefill_comes_last():
    groups = plan(SHAPE, ("A", "W64", "W128"), [1024], [1], ("decode", "prefill"), 512, 16 * GIB, 4)
    assert {p.block for p in groups[0]} == {"embedding", "norm", "mlp", "head"}
    found = [{(p.block, p.mode) for p in group} for group in groups[1:]]
    assert found == [{(name, mode)} for mode in ("decode", "prefill") for name in ("A", "W64", "W128")]


def test_max_batch_follows_memory_and_context():
    shape = MODELS["jet-nemotron-2b"]
    sizes = [largest_batch(shape, ("A", "J"), context, 141 * 10**9, 2) for context in (4096, 65536, 262144)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] >= 1
    for context, batch in zip((4096, 65536, 262144), sizes, strict=True):
        assert batch & (batch - 1) == 0
        hybrid = ("A", *("J",) * 27)
        needed = shape.parameters(hybrid) * 2 + shape.cache_bytes(hybrid, batch, context)
        assert needed < 141e9
    assert largest_batch(shape, ("A",), 262144, 1 << 20, 2) == 1
    with_max = [p.batch for p in points(batches=[1, "max"], contexts=[8192]) if p.block == "A" and p.mode == "decode"]
    assert with_max == [1, batch_limit(SHAPE, "A", ("A", "J"), 8192, 16 * GIB, 4)]


def test_every_batch_that_a_model_may_have_is_covered():
    shape, memory = MODELS["jet-nemotron-2b"], 141 * 10**9
    for context in (4096, 131072, 262144):
        assert batch_limit(shape, "J", "AWJG", context, memory, 2) == 1024
        limit = batch_limit(shape, "A", "AWJG", context, memory, 2)
        lean = ("A", *("W",) * 27)
        room = memory - 2 * shape.parameters()
        assert limit == 1024 or 0.9 * room < shape.cache_bytes(lean, limit, context) <= room
    assert batch_limit(shape, "A", "A", 262144, 1 << 30, 2) == 1


def test_auto_batches_are_powers_of_two_up_to_the_largest():
    shape = MODELS["jet-nemotron-2b"]
    memory = 141 * 10**9
    contexts = [4096, 65536, 262144]
    found = [
        point
        for group in plan(shape, "AWJG", contexts, ["auto"], ("decode", "prefill"), 2048, memory, 2)
        for point in group
    ]
    assert len(found) == len(set(found))
    for context in contexts:
        largest = batch_limit(shape, "A", "AWJG", context, memory, 2)
        batches = {p.batch for p in found if (p.block, p.mode, p.context) == ("A", "decode", context)}
        # Beyond the first context what differs is the reading of keys, in proportion to the batch.
        assert {1, 2, 8, 32, largest} <= batches
        assert {4, 16, 33, 64, 65} <= batches or context != 4096
        assert max(batches) == largest
    powers = {1 << power for power in range(11)}
    assert {p.batch for p in found if (p.block, p.mode) == ("J", "decode")} >= powers | {129}
    products = {p.batch for p in found if (p.block, p.mode) == ("mlp", "decode")}
    assert {p.batch for p in found if (p.block, p.mode) == ("norm", "decode")} == {1, 2, 8, 32, 128, 512, 1024}
    assert products >= powers | {33, 65, 129, 257, 513, 384, 769}
    prefill = {(p.context, p.batch) for p in found if (p.block, p.mode) == ("A", "prefill")}
    assert prefill >= {(2048, 64), (4096, 2), (4096, 8), (262144, 2)}
    assert not prefill & {(4096, 64), (262144, 8)}


def test_short_prompts_have_chunks_of_their_own_and_the_dearest_rows_come_last():
    groups = plan(SHAPE, "AJ", [1024, 8192], ["auto"], ("prefill",), 4096, 80 * GIB, 2)
    chunks = {(point.context, point.chunk) for point in groups[1]}
    assert chunks == {(1024, 1024), (4096, 4096), (8192, 4096)}
    assert {point.chunk for point in groups[0] if point.block == "mlp"} == {1024, 4096}
    for group in groups[1:]:
        tokens = [point.batch * point.context for point in group]
        assert tokens == sorted(tokens)


def test_bad_plans():
    with pytest.raises(UserError, match="unknown mode 'train'"):
        points(modes=("train",))
    with pytest.raises(UserError, match="unknown layer kind 'Q'"):
        points(names=("Q",))
    with pytest.raises(UserError, match="context 16384 is not of smollm2-135m"):
        points(contexts=[16384])
    assert parse_batches("1, MAX,4,1") == [1, "max", 4]
    for text in ("", "0", "x"):
        with pytest.raises(UserError):
            parse_batches(text)
