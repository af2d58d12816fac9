"""The cost model against sums done by hand, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from nasbench.core.errors import UserError
from nasbench.cost import CostModel, find_profiles, profiled_devices
from nasbench.model.shapes import MODELS
from nasbench.store import SHARED_BLOCKS, Database, Row, block_cells

SHAPE = MODELS["smollm2-135m"]
SHARED_US = {"embedding": 5.0, "norm": 2.0, "mlp": 100.0, "head": 1000.0}
CHUNK = 512


def time_us(block: str, batch: int, context: int) -> float:
    """Affine in batch and context: interpolation must be exact."""
    if block in SHARED_US:
        return SHARED_US[block] * (1 + 0.1 * batch)
    block = block[0]
    slope = {"A": 0.05, "W": 0.0, "J": 0.0, "G": 0.0}[block]
    return {"A": 80.0, "W": 90.0, "J": 150.0, "G": 130.0}[block] + batch * (10 + slope * context)


def make(block: str, batch: int, context: int, chunk: int = 0, **cells) -> Row:
    config = None if block in SHARED_BLOCKS else SHAPE.mixer(block)
    named = (block, "") if config is None else (config.kind, config.args)
    middle = time_us(block, batch, context) * (chunk / 4 or 1)
    mode = "prefill" if chunk else "decode"
    defaults = {"device": "dev", "implementation": "torch-eager", "dtype": "fp32", "mode": mode}
    place = {"batch": batch, "context": context, "chunk": chunk}
    times = {"p20_us": middle * 0.9, "p50_us": middle, "p80_us": middle * 1.1, "repeats": 9}
    return Row(**(defaults | block_cells(SHAPE, *named) | place | times | cells))


def rows_of(batches=(1, 4), contexts=(1024, 8192)) -> list[Row]:
    rows = [make(block, batch, 0) for block in SHARED_BLOCKS for batch in batches]
    rows += [make(block, batch, context) for block in "AWJG" for batch in batches for context in contexts]
    rows += [make(block, 1, 0, CHUNK) for block in ("embedding", "norm", "mlp")]
    rows += [make(block, 1, context, CHUNK) for block in "AWJG" for context in (CHUNK, *contexts)]
    return rows


@pytest.fixture(scope="module")
def costs() -> CostModel:
    return CostModel(rows_of(), SHAPE, "fp32")


def by_hand_us(placement, context, batch):
    norms = (2 * len(placement) + 1) * time_us("norm", batch, 0)
    shared = time_us("embedding", batch, 0) + time_us("head", batch, 0) + len(placement) * time_us("mlp", batch, 0)
    return shared + norms + sum(time_us(name, batch, context) for name in placement)


@pytest.mark.parametrize(("context", "batch"), [(1024, 1), (8192, 4), (1024, 3), (3000, 1), (5000, 2)])
def test_decode_is_the_sum_of_its_blocks(costs, context, batch):
    placement = SHAPE.parse("14J A 4J A 2W 8G")
    cost = costs.decode(placement, context, batch)
    expected = by_hand_us(placement, context, batch)
    assert cost.step_ms == pytest.approx(expected / 1e3, rel=1e-9)
    assert cost.decode_tok_s == pytest.approx(batch * 1e6 / expected, rel=1e-9)
    assert cost.cache_bytes == SHAPE.cache_bytes(placement, batch, context, 4)
    assert cost.conv_state_bytes == SHAPE.conv_state_bytes(placement, batch, 4)
    assert (cost.source, cost.device, cost.placement) == ("measured", "dev", "14J A 4J A 2W 8G")


def test_prefill_is_the_sum_of_its_chunks(costs):
    placement = SHAPE.parse("15A 15J")
    scale = CHUNK / 4

    def chunk_us(end):
        norms = (2 * 30 + 1) * time_us("norm", 1, 0)
        shared = time_us("embedding", 1, 0) + 30 * time_us("mlp", 1, 0)
        return scale * (norms + shared + sum(time_us(name, 1, end) for name in placement))

    whole = sum(chunk_us(end) for end in range(CHUNK, 2048 + 1, CHUNK)) + time_us("head", 1, 0)
    assert costs.prefill(placement, 2048, 1).prefill_tok_s == pytest.approx(2048e6 / whole, rel=1e-9)
    part = whole + chunk_us(2048 + 128) * 128 / CHUNK
    assert costs.prefill(placement, 2176, 1).prefill_tok_s == pytest.approx(2176e6 / part, rel=1e-9)
    # Sequences beyond the measured batch are read in turns; one head scores the last tokens of all.
    turns = 4 * (whole - time_us("head", 1, 0)) + time_us("head", 4, 0)
    assert costs.prefill(placement, 2048, 4).prefill_tok_s == pytest.approx(4 * 2048e6 / turns, rel=1e-9)
    assert costs.cost(placement, 2048, 4).prefill_tok_s == costs.prefill(placement, 2048, 4).prefill_tok_s


def test_a_prompt_shorter_than_a_chunk_takes_what_was_measured_of_its_length(costs):
    """Half a chunk's attention is a quarter of a whole one's, so that its share would be too much."""
    placement = SHAPE.parse("15A 15J")
    short = {"A": 2_000.0, "J": 9_000.0, "embedding": 100.0, "norm": 50.0, "mlp": 5_000.0}
    rows = [
        make(block, 1, 0 if block in SHARED_BLOCKS else CHUNK // 2, CHUNK // 2, p20_us=us, p50_us=us, p80_us=us)
        for block, us in short.items()
    ]
    model = CostModel([*rows_of(), *rows], SHAPE, "fp32")
    head_us = time_us("head", 1, 0)

    def us(tokens, found=model):
        return tokens * 1e6 / found.prefill(placement, tokens, 1).prefill_tok_s - head_us

    half = 15 * (short["A"] + short["J"]) + short["embedding"] + 61 * short["norm"] + 30 * short["mlp"]
    assert us(CHUNK // 2) == pytest.approx(half, rel=1e-9)
    assert us(CHUNK) == pytest.approx(us(CHUNK, costs), rel=1e-9)
    assert us(3 * CHUNK // 4) == pytest.approx((half + us(CHUNK)) / 2, rel=1e-9)
    # Below everything that was measured, and behind a whole chunk: a share.
    assert us(CHUNK // 4) == pytest.approx(half / 2, rel=1e-9)
    assert us(CHUNK + CHUNK // 2) == pytest.approx(us(CHUNK + CHUNK // 2, costs), rel=1e-9)
    # A kind without such rows is a share of its whole chunk.
    mixed = SHAPE.parse("15A 15W")
    assert model.prefill(mixed, CHUNK // 2, 1).prefill_tok_s > 0


def test_a_chunk_takes_the_longer_of_launches_and_work():
    """A is long on the device, J on the host, which runs ahead: their sums compete, not each layer's two times."""
    host_us = {"A": 10.0, "J": 70_000.0}
    rows = [
        replace(row, host_us=host_us[row.block]) if row.chunk and row.block in host_us else row for row in rows_of()
    ]
    costs, without = CostModel(rows, SHAPE, "fp32"), CostModel(rows_of(), SHAPE, "fp32")

    def us(model, placement, batch=1):
        found = model.prefill(SHAPE.parse(placement), CHUNK, batch)
        return batch * CHUNK * 1e6 / found.prefill_tok_s - model._blocks.head(batch, False).us

    assert us(costs, "28A 2J") == pytest.approx(us(without, "28A 2J"))
    assert us(costs, "15A 15J") > us(without, "15A 15J")
    assert us(costs, "1A 29J") == pytest.approx(29 * 70_000 + 10, rel=1e-9)
    # More sequences are more work by as many launches.
    assert us(costs, "1A 29J", 64) == pytest.approx(us(without, "1A 29J", 64))


def test_prefill_is_none_without_its_rows():
    costs = CostModel([row for row in rows_of() if row.mode == "decode"], SHAPE, "fp32")
    cost = costs.cost(SHAPE.placement, 2048, 1)
    assert cost.decode_tok_s is not None
    assert cost.prefill_tok_s is None
    with pytest.raises(UserError, match="--modes decode,prefill"):
        costs.prefill(SHAPE.placement, 2048, 1)


@pytest.mark.parametrize(
    ("placement", "context", "batch", "said"),
    [
        ("30A", 8192, 8, r"block embedding .* at batch 8: measured are batch 1, 4; .*--batches 8"),
        (
            "30A",
            512,
            1,
            r"block A .* context 512, batch 1: measured are batch 1, 4 at context 1k, 8k; .*--contexts 512",
        ),
        ("29A W99", 2048, 1, r"block W 99 .* not measured at all; .*--blocks W99"),
        ("30A", 8193, 1, r"context 8193 is not of smollm2-135m"),
        ("30A", 2048, 0, r"batch 0"),
    ],
)
def test_what_was_not_measured_is_refused_by_name(costs, placement, context, batch, said):
    with pytest.raises(UserError, match=said):
        costs.decode(SHAPE.parse(placement), context, batch)


def test_extrapolation_only_when_asked(costs):
    placement = SHAPE.parse("15A 15G")
    cost = costs.decode(placement, 512, 8, extrapolate=True)
    assert cost.step_ms == pytest.approx(by_hand_us(placement, 512, 8) / 1e3, rel=1e-9)


def test_batches_may_differ_between_contexts():
    """The largest batch that fits falls with the context; both lines still cover what lies between."""
    rows = [row for row in rows_of((1, 64), (1024, 8192)) if row.block != "A" or row.context != 8192 or row.batch == 1]
    rows.append(make("A", 16, 8192))
    costs = CostModel(rows, SHAPE, "fp32")
    assert costs.decode(SHAPE.placement, 4000, 8).step_ms == pytest.approx(by_hand_us("A" * 30, 4000, 8) / 1e3)
    with pytest.raises(UserError, match="context 4000, batch 32"):
        costs.decode(SHAPE.placement, 4000, 32)


def test_a_kind_that_does_the_same_everywhere_needs_one_context(costs):
    sparse = [row for row in rows_of() if row.block not in ("J", "G") or row.context in (1024, CHUNK)]
    few = CostModel(sparse, SHAPE, "fp32")
    for placement in ("10A 10J 10G", "30J"):
        assert few.cost(SHAPE.parse(placement), 8192, 4) == costs.cost(SHAPE.parse(placement), 8192, 4)
    without = CostModel([row for row in sparse if row.block != "A" or row.context == 1024], SHAPE, "fp32")
    with pytest.raises(UserError, match="block A"):
        without.decode(SHAPE.parse("30A"), 8192, 4)


def test_one_estimated_row_marks_the_sum():
    rows = rows_of()
    marked = [replace(row, source="estimated") if (row.block, row.context) == ("G", 8192) else row for row in rows]
    costs = CostModel(marked, SHAPE, "fp32")
    assert costs.decode(SHAPE.parse("29A G"), 4096, 1).source == "estimated"
    assert costs.decode(SHAPE.parse("29A G"), 1024, 1).source == "measured"
    assert costs.decode(SHAPE.parse("30A"), 4096, 1).source == "measured"


def test_rows_of_others_do_not_count(costs):
    noise = [
        replace(make("A", 1, 2048), dtype="bf16", p50_us=9.0, p20_us=1.0),
        replace(make("A", 1, 2048), hidden_size=577, p50_us=9.0, p20_us=1.0),
        replace(make("A", 1, 2048), variant="bias", p50_us=9.0, p20_us=1.0),
        replace(make("A", 1, 2048), status="oom", p20_us=None, p50_us=None, p80_us=None),
    ]
    same = CostModel(rows_of() + noise, SHAPE, "fp32").decode(SHAPE.placement, 2048, 1)
    assert same == costs.decode(SHAPE.placement, 2048, 1)
    with pytest.raises(UserError, match="several devices: dev, other"):
        CostModel([*rows_of(), replace(rows_of()[0], device="other")], SHAPE, "fp32")
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        CostModel([], SHAPE, "int8")


@pytest.mark.parametrize(
    ("model", "mib"),
    [("qwen3-1.7b", 7168), ("qwen2.5-1.5b", 1792), ("jet-nemotron-4b", 258), ("jet-nemotron-2b", 157.25)],
)
def test_published_cache_sizes(model, mib):
    """arXiv 2508.15884 table 1, at 64K; it prints 154 for the 2B, whose released shape has 157.25."""
    shape = MODELS[model]
    assert CostModel([], shape, "bf16").cache(shape.placement, 65536, 1).cache_bytes == mib * 2**20


def test_profiles_are_found_by_device(tmp_path: Path, monkeypatch):
    Database(tmp_path / "dev.csv").merge(rows_of())
    assert len(find_profiles("dev", tmp_path)) == len(rows_of())
    assert len(find_profiles("dev", tmp_path / "dev.csv")) == len(rows_of())
    assert profiled_devices(tmp_path) == ["dev"]
    with pytest.raises(UserError, match="unknown device 'dew': choose from dev; did you mean 'dev'"):
        find_profiles("dew", tmp_path)
    with pytest.raises(UserError, match="no such profile folder"):
        find_profiles("dev", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nor of any other"):
        find_profiles("dev", tmp_path / "empty")


def test_own_rows_stand_over_the_shipped_ones(tmp_path, monkeypatch):
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    old = make("A", 1, 1024, measured_utc="2026-01-01T00:00:00Z")
    new = replace(old, p50_us=old.p50_us * 1.05, measured_utc="2026-02-01T00:00:00Z")
    Database(shipped / "dev.csv").merge([old, make("J", 1, 1024)])
    Database(own / "dev.csv").merge([new])
    monkeypatch.setattr("nasbench.cost.files.profiles_dir", lambda: shipped)
    monkeypatch.setattr("nasbench.cost.files.default_db_dir", lambda: own)
    rows = {row.block: row for row in find_profiles("dev")}
    assert set(rows) == {"A", "J"}
    assert rows["A"].p50_us == pytest.approx(new.p50_us, abs=1e-4)
