"""benchmarks/launches.py times what a step multiplies, in the chosen launches and others, and nothing that is wrong."""

import json
import math
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from nasbench.runtime.fused_step import FusedStep
from nasbench_kernels.decode.product_launch import batch_launch, swiglu_launch

import benchmarks.launches as bench
from benchmarks.launch_cases import (
    Candidate,
    Product,
    ProductCase,
    candidates,
    divided_tiles,
    products,
    stage_bytes,
    whole_tiles,
)
from nasbench.checkpoints.load import random_decoder
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.model import fused
from nasbench.model.shapes import ModelSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = ModelSpec(
    "tiny", "qwen2", 5, 32, 48, 4, 2, 8, 96, 4096, 10_000.0, 1e-6, qkv_bias=True, published_placement="A W 2J G",
    defaults=(("W", "16"), ("J", "2x16x24"), ("G", "2x16x24")),
)  # fmt: skip
HALF = {"device": DEVICE, "dtype": torch.float16}
"""The interpreter multiplies bf16 matrices as if they were integers."""


def always(part=""):
    return 1.0


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_the_products_are_those_of_a_step(batch, monkeypatch):
    """What is multiplied, by which function, with which bias; for one sequence with what before and after it, too."""
    seen = Counter()

    def record(kind, work, x, weight, bias=None, **options):
        around = (options.get("before", ""), "add_to" in options, options.get("swiglu", False))
        seen[kind, *weight.shape, bias is not None, *around] += 1
        return work(x, weight, *(() if bias is None else (bias,)), **options)

    if batch == 1:
        monkeypatch.setattr(fused.ops(), "gemv", partial(record, "gemv", fused.ops().gemv))
    else:
        for name in ("linear", "left_over", "swiglu_linear"):
            monkeypatch.setattr(fused, name, partial(record, name, getattr(fused, name)))
        both = fused.ops().product_and_silu

        def with_silu(x, weight, bias, *columns):
            return record("linear", lambda *given: both(*given[:2], bias, *columns), x, weight, bias)

        monkeypatch.setattr(fused.ops(), "product_and_silu", with_silu)
    decoder = random_decoder(TINY, TINY.placement, dtype=torch.float16, device=DEVICE)
    cache = decoder.new_cache(batch, 8)
    zeros = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    FusedStep(decoder, cache, 8)(zeros, zeros)
    expected = Counter()
    for product, count in products(TINY).items():
        kind, around = "gemv", (product.before, product.divided, product.swiglu)
        if batch > 1:
            kind = "left_over" if product.divided else "swiglu_linear" if product.swiglu else "linear"
            around = ("", False, False)
        expected[kind, product.rows, product.columns, product.bias, *around] += count
    assert seen == expected
    assert sum(seen.values()) == 4 * 5 + 2 + 1


def test_products_of_the_published_shape():
    found = products(resolve_shape("jet-nemotron-2b"))
    assert found[Product("inputs", 8856, 1536)] == found[Product("generator", 12288, 384, True)] == 24
    assert found[Product("inputs", 2048, 1536, True)] == 4  # A and W
    assert found[Product("gate+up", 2 * 8960, 1536)] == found[Product("down", 1536, 8960)] == 28


@pytest.mark.parametrize("batch", [1, 2, 16, 64, 100, 128])
def test_one_launch_is_the_chosen_one(batch):
    for product in products(resolve_shape("jet-nemotron-2b")):
        found = candidates(product, batch, DEVICE, torch.bfloat16)
        assert [candidate.chosen for candidate in found] == [True] + [False] * (len(found) - 1)
        assert len({str(candidate) for candidate in found}) == len(found) > 5
        assert batch == 1 or "cuBLAS" in map(str, found)


def test_the_choice_is_the_kernels_own(monkeypatch):
    """What a step launches by itself is what the chosen candidate says."""
    import nasbench_kernels.decode.product as module

    launched = []
    for name in ("launch_batch_product", "launch_swiglu_product"):
        monkeypatch.setattr(module, name, lambda *arguments: launched.append(arguments[-1]))
    for product in (Product("inputs", 320, 96), Product("outputs", 96, 320), Product("gate+up", 320, 96)):
        x, weight = torch.zeros(7, product.columns, **HALF), torch.zeros(product.rows, product.columns, **HALF)
        if product.swiglu:
            fused.swiglu_linear(x, weight)
        else:
            (fused.left_over if product.divided else fused.linear)(x, weight)
        assert candidates(product, 7, **HALF)[0] == Candidate("product", launched.pop(), True)


def test_parts_of_every_tile_cover_the_columns():
    for columns, rows in ((8960, 1536), (3072, 1536), (64, 7)):
        base = batch_launch(64, rows, columns, 2, 132, 228 << 10, True)
        found = divided_tiles(base, rows, columns, 2, 132, 228 << 10)
        assert base in found
        for launch in found:
            share = launch.share(columns)
            assert (launch.parts - 1) * share < columns <= launch.parts * share
        assert columns == 64 or len({launch.parts for launch in found}) > 3


@pytest.mark.parametrize("batch", [16, 64, 128])
@pytest.mark.parametrize(("sms", "shared"), [(132, 228 << 10), (82, 100 << 10)])
def test_whole_tiles_fit_the_card(batch, sms, shared):
    for outputs, columns, swiglu in ((8856, 1536, False), (8960, 1536, True), (11008, 2048, True)):
        if swiglu:
            base = swiglu_launch(batch, outputs, 2, sms, shared)
        else:
            base = batch_launch(batch, outputs, columns, 2, sms, shared, False)
        found = whole_tiles(base, batch, outputs, 2, sms, shared, swiglu)
        assert found[0] == base
        assert len(found) <= 13
        assert len({launch.turned for launch in found}) == 2
        for launch in found[1:]:
            assert launch.stages * stage_bytes(launch, 2, swiglu) < shared, launch
            assert launch.sequences >= batch


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_every_launch_is_right(batch):
    calls = []

    def time_us(timed):
        for call in timed[:2]:
            call()
        calls.append(len(timed))
        return 2.0 * len(timed)

    for product, count in products(TINY).items():
        rows = list(bench.product_rows(TINY, product, count, batch, time_us=time_us, left=always, sets=2, **HALF))
        assert {row.status for row in rows} == {"ok"}, product
        assert {row.us for row in rows} == {2.0}
        # Parts in fp32 of products of so few columns are exact on some processors.
        assert all(0 <= row.error < 2e-3 for row in rows)
        assert max(row.error for row in rows) > 0
        assert rows[0].nbytes == 2 * product.rows * product.columns
        assert bench.best_of(rows)[0] == rows[0]
    assert set(calls) == {16}
    rows = list(bench.argmax_rows(TINY, batch, time_us=time_us, sets=2, **HALF))
    assert [row.status for row in rows] == ["ok"] * 4
    assert [row.chosen for row in rows] == [True, False, False, False]


@pytest.mark.parametrize("wrong", [lambda y: y * 1.1, lambda y: y * math.nan])
@torch.inference_mode()
def test_what_is_wrong_has_no_time(wrong, monkeypatch):
    plain = ProductCase.run
    monkeypatch.setattr(ProductCase, "run", lambda case, *rest: wrong(plain(case, *rest)))
    rows = list(
        bench.product_rows(
            TINY, Product("outputs", 32, 48), 1, 3, time_us=lambda _: pytest.fail("timed"), left=always, sets=1, **HALF
        )
    )
    assert all(math.isnan(row.us) and row.status.startswith("wrong") for row in rows)
    assert bench.best_of(rows) is None
    assert bench.exit_code(rows) == 1
    assert bench.exit_code(rows[1:]) == 0  # not the chosen one
    assert len(bench.lines(rows)) == 1 + len(rows)


def test_what_an_earlier_launch_left_is_no_result(monkeypatch):
    case = ProductCase(Product("head", 96, 32), 3, sets=1, **HALF)
    cublas = Candidate("cuBLAS")
    assert case.error(cublas) < 2e-3
    stale = case.run(cublas, case.weights[0], case.residual)
    monkeypatch.setattr(case, "run", lambda *_: stale)
    assert case.error(cublas) > 0.5


def test_what_cannot_run_is_told():
    def raises(error):
        raise error

    judge = partial(bench.judge, bound=1.0, calls=lambda: [lambda: None], time_us=lambda calls: 2.0 * len(calls))
    assert judge(lambda: 0.5) == {"us": 2.0, "error": 0.5, "status": "ok"}
    assert judge(partial(raises, RuntimeError("shared memory\nis short")))["status"] == "does not run: shared memory"
    assert judge(partial(raises, torch.OutOfMemoryError("no")))["status"].startswith("left out")


def row(product, us, chosen, count=1):
    return bench.Row(
        "jet-nemotron-2b", product.part, count, 16, product.rows, product.columns, 1 << 20, "product", f"at {us}",
        us, 0.0, chosen, "ok",
    )  # fmt: skip


def test_the_table():
    case = [row(Product("head", 96, 32), us, us == 12.0) for us in (12.0, 10.0, 30.0)]
    (text,) = bench.lines(case)
    assert "* at 12.0" in text
    assert "best at 10.0" in text
    assert "loses  20% of 3" in text
    found = products(resolve_shape("jet-nemotron-2b"))
    rows = [row(product, us, us == 3.0, count=count) for product, count in found.items() for us in (3.0, 2.0)]
    total = sum(found.values())
    (told,) = bench.sums(rows)
    assert told.startswith("jet-nemotron-2b x16")
    assert f"{3e-3 * total:.3f} ms as chosen, {2e-3 * total:.3f} at best" in told
    assert bench.sums(rows[2:]) == []


def test_it_ends_in_time(capsys):
    def forever():
        yield row(Product("head", 96, 32), 12.0, True)
        while True:
            with suppress(Exception):  # as libraries do
                time.sleep(0.01)

    def never():
        pytest.fail("begun")
        yield

    works = [("argmax", "late", never), ("products", "long", forever), ("steps", "next", never)]
    began = time.monotonic()
    rows = bench.measure_all(works, 0.2, lambda part: 0.0 if part == "argmax" else 1.0)
    assert time.monotonic() - began < 2
    assert len(rows) == 1
    told = capsys.readouterr().out
    assert "* at 12.0" in told
    for text in ("argmax: the seconds did not suffice for late", "products: the seconds did not suffice for long"):
        assert text in told
    assert "steps: the seconds did not suffice for next" in told


@torch.inference_mode()
def test_a_whole_run(capsys):
    works = list(bench.work_of([TINY], [1], lambda calls: 2.0 * len(calls), always, DEVICE))
    assert [part for part, *_ in works] == ["argmax", *["products"] * len(products(TINY)), *["states"] * 4, "steps"]
    # Weights of a few kilobytes would be copied thousands of times.
    works = [(part, name, partial(build, sets=1)) for part, name, build in works if part in ("argmax", "products")]
    rows = bench.measure_all(works, 60, always)
    assert {row.status for row in rows} == {"ok"}
    told = capsys.readouterr().out
    assert len(told.splitlines()) == len(works)
    assert "suffice" not in told


@pytest.mark.parametrize("able", [True, False])
def test_whole_steps(able, monkeypatch):
    """64 sequences where 128 do not fit; both kinds of step only where the card has both."""
    from nasbench_kernels.decode import overlap

    import benchmarks.decode as decode
    from nasbench.checkpoints import load
    from nasbench.core.errors import MachineError
    from nasbench.runtime import memory, throughput
    from nasbench.runtime import roofline as floor

    def measure(*_, context, batch, **rest):
        if context > 4096:
            raise MachineError("no room")
        return SimpleNamespace(step_ms=1.0 if overlap.dependent(DEVICE)["PDL"] else 2.0)

    monkeypatch.setattr(overlap, "capability", lambda device: 9 if able else 8)
    monkeypatch.setattr(decode, "step_error", lambda shape: 0.001)
    for module, name, stand_in in (
        (floor, "measure_ceilings", lambda *_: None), (memory, "free_bytes", lambda _: 1 << 30),
        (memory, "largest_batch", lambda *_, **__: 64), (load, "random_decoder", lambda *_, **__: None),
        (throughput, "measure", measure),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, stand_in)
    rows = list(bench.step_rows(TINY, DEVICE))
    assert [(row.product, row.batch, row.kind) for row in rows if row.status == "ok"] == (
        [("step 4k", 1, "overlapping"), ("step 4k", 1, "each waits")] if able else [("step 4k", 1, "each waits")]
    )
    assert {row.status for row in rows if row.batch == 64} == {"left out: no room"}
    assert next(row.us for row in rows if row.chosen) == (1e3 if able else 2e3)
    assert bench.exit_code(rows) == 0
    monkeypatch.setattr(decode, "step_error", lambda shape: math.nan)
    assert bench.exit_code(list(bench.step_rows(TINY, DEVICE))) == 1


def test_arguments(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err
    for arguments, text in ((["--batches", "1,256"], "1 to 128"), (["--shapes", "jet-nemotron-9b"], "jet-nemotron-9b")):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert text in capsys.readouterr().err


@pytest.mark.gpu
def test_one_part_on_a_gpu(tmp_path):
    out = tmp_path / "launches.json"
    arguments = ["--shapes", "qwen2.5-1.5b", "--batches", "1,3", "--only", "products", "--seconds", "40"]
    assert bench.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert any(row["chosen"] and row["us"] > 0 for row in rows)
