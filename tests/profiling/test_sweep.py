"""Whole sweeps of a tiny model: rows, resuming, faults, and whether the sum of the rows predicts the whole decoder."""

import os
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nasbench.core.by_device import ByDevice
from nasbench.core.errors import MachineError, UserError
from nasbench.cost import CostModel
from nasbench.devices import detect
from nasbench.model.decoder import Decoder
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.profiling import in_process
from nasbench.profiling import sweep as sweep_module
from nasbench.profiling.measure import measure, point_cells, stamp
from nasbench.profiling.plan import Point
from nasbench.profiling.sweep import noise, prepare, run
from nasbench.profiling.telemetry import Reading, Telemetry, shared, unequal_clocks
from nasbench.profiling.time_budget import LEAST_SECONDS
from nasbench.profiling.workload import Workload, build
from nasbench.store import CEILINGS, Database, Row, read_db

TINY = ModelSpec("tiny", "llama", 4, 64, 128, 4, 2, 16, 256, 512, 1e4, 1e-5, defaults=(("W", "32"),))
ASKED = {
    "blocks": "AWJG",
    "contexts": [64, 256],
    "batches": [1, 2],
    "chunk": 32,
    "seconds_per_row": 0.002,
    "isolate": False,
}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """Bandwidth over a megabyte: these tests are not about the machine."""
    monkeypatch.setattr("nasbench.runtime.roofline.BUFFER_BYTES", ByDevice(cpu=1 << 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("db")


@pytest.fixture(scope="module")
def rows(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nasbench.runtime.roofline.BUFFER_BYTES", ByDevice(cpu=1 << 20))
        result = run(prepare(TINY, db=folder, **ASKED))
    return read_db(result.path)


def test_every_planned_row_is_there_and_ok(rows):
    assert {row.status for row in rows} == {"ok"}
    assert {row.block for row in rows} == {"A", "W", "J", "G", "mlp", "norm", "embedding", "head", "ceiling"}
    assert {row.args for row in rows if row.block == "ceiling"} == set(CEILINGS)
    # What does the same at every context is measured at the first.
    for mode, wanted in (("decode", {64, 256}), ("prefill", {32, 64, 256})):
        found = [{row.context for row in rows if (row.block, row.mode) == (block, mode)} for block in "AJG"]
        assert found == [wanted, {min(wanted)}, {min(wanted)}]


def test_rows_tell_where_they_are_from(rows):
    for row in rows:
        assert row.source == "measured"
        assert row.torch == torch.__version__
        assert row.project
        assert row.driver.endswith("threads")
        assert row.implementation == "torch-eager"
        assert row.measured_utc.endswith("Z")
        assert row.repeats is not None
        assert row.repeats >= 3


def test_the_allocators_cache_is_the_formulas(rows):
    for row in rows:
        if row.block in "AWJG":
            config = TINY.mixer(row.block)
            assert row.cache_bytes == row.cache_formula_bytes == config.cache_bytes(row.batch, row.context, 4)
            assert row.conv_state_bytes == config.conv_state_bytes(row.batch, 4)
            assert row.gb_s is not None
            assert row.bandwidth_fraction is not None
            assert row.args == config.args


def test_the_cost_model_reads_what_the_sweep_writes(rows):
    costs = CostModel(rows, TINY, "fp32")
    cost = costs.cost(TINY.parse("AWJG"), 100, 2)
    assert cost.decode_tok_s is not None
    assert cost.prefill_tok_s is not None
    assert cost.source == "measured"


def test_a_resumed_sweep_measures_nothing_again(rows, folder, monkeypatch):
    path = prepare(TINY, db=folder, **ASKED).path
    before = path.read_bytes()
    monkeypatch.setattr(in_process, "measure", lambda *args: pytest.fail("measured again"))
    result = run(prepare(TINY, db=folder, **ASKED))
    assert (result.rows, result.skipped) == ([], len(rows) - 4)
    assert path.read_bytes() == before
    more = prepare(TINY, db=folder, **(ASKED | {"contexts": [64, 128, 256]}))
    assert {point.context for point in more.points} == {128}
    assert len(prepare(TINY, db=folder, force=True, **ASKED).points) == len(rows) - 4
    # The same kinds with another data type or shape are other rows.
    assert len(prepare(TINY, db=folder, dtype="bf16", **ASKED).points) == len(rows) - 4
    assert len(prepare(replace(TINY, hidden_size=96), db=folder, **ASKED).points) == len(rows) - 4


def test_progress_counts_every_row(tmp_path):
    seen = []
    asked = ASKED | {"blocks": "A", "contexts": [64], "batches": [1], "modes": ("decode",)}
    run(prepare(TINY, db=tmp_path, **asked), lambda done, total, row: seen.append((done, total)))
    # Four ceilings, then five points in three rounds.
    assert seen[:19] == [(i + 1, 19) for i in range(19)]
    # Then noisy rows again, at most a tenth.
    assert len(seen) <= 20


def test_the_fastest_of_all_rounds_is_kept(tmp_path, monkeypatch):
    real, calls = in_process.measure, {}

    def drifting(machine, bench, point):
        calls[point] = calls.get(point, 0) + 1
        row = real(machine, bench, point)
        return replace(
            row, p20_us=90.0 + calls[point] % 3, p50_us=90.0 + calls[point] % 3, p80_us=93.0, throttled=False
        )

    monkeypatch.setattr(in_process, "measure", drifting)
    asked = ASKED | {"blocks": "A", "contexts": [64], "batches": [1], "modes": ("decode",)}
    result = run(prepare(TINY, db=tmp_path, **asked))
    assert set(calls.values()) == {3}
    assert {row.p50_us for row in result.rows if row.block != "ceiling"} == {90.0}
    assert {row.p50_us for row in read_db(result.path) if row.block != "ceiling"} == {90.0}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "oom"),
        (MemoryError("no"), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (NotImplementedError("no kernel for this"), "unsupported"),
        (ValueError("a kind's own\nmistake"), "failed"),
    ],
)
def test_a_row_that_fails_is_a_row_and_the_sweep_goes_on(tmp_path, monkeypatch, error, status):
    def fail(bench, point):
        if point.block == "A":
            raise error
        return build(bench, point)

    monkeypatch.setattr("nasbench.profiling.measure.build", fail)
    asked = ASKED | {"blocks": "AJ", "contexts": [64], "batches": [1], "modes": ("decode",)}
    result = run(prepare(TINY, db=tmp_path, **asked))
    by_block = {row.block: row for row in read_db(result.path)}
    assert by_block["A"].status == status
    assert type(error).__name__ in by_block["A"].reason
    assert by_block["A"].p50_us is None
    assert by_block["J"].status == "ok"
    # What is known not to fit is not tried again; what failed is.
    again = {point.block for point in prepare(TINY, db=tmp_path, **asked).points}
    assert again == ({"A"} if status == "failed" else set())


def test_a_layer_larger_than_the_memory_is_oom_without_trying(tmp_path):
    todo = prepare(TINY, db=tmp_path, **ASKED)
    tight = replace(todo.bench, memory_bytes=10_000)
    with pytest.raises(MemoryError, match="usable are 10000"):
        build(tight, Point("A", "decode", 1, 256))


def test_ctrl_c_keeps_what_is_measured(tmp_path, monkeypatch):
    real = in_process.measure

    def stop(machine, bench, point):
        if point == Point("W", "decode", 2, 64):
            raise KeyboardInterrupt
        return real(machine, bench, point)

    monkeypatch.setattr(in_process, "measure", stop)
    todo = prepare(TINY, db=tmp_path, **ASKED)
    with pytest.raises(KeyboardInterrupt):
        run(todo)
    kept = Database(todo.path).read()
    assert {row.block for row in kept} >= {"A", "mlp", "norm", "W"}
    left = prepare(TINY, db=tmp_path, **ASKED).points
    assert len(left) + len(kept) - 4 == len(todo.points)


def test_instances_are_cold_and_share_no_memory():
    todo = prepare(TINY, **ASKED)
    bench = replace(todo.bench, llc_bytes=1 << 16)
    work = build(bench, Point("A", "decode", 1, 256))
    assert len(work.calls) >= 4
    weights = {next(call.args[0].parameters()).data_ptr() for call in work.calls}  # type: ignore[attr-defined]
    caches = {call.args[4].state["keys"].data_ptr() for call in work.calls}  # type: ignore[attr-defined]
    assert len(weights) == len(caches) == len(work.calls)
    assert all(call.args[4].state["keys"].abs().min() > 0 for call in work.calls)  # type: ignore[attr-defined]
    one = TINY.mixer("A").parameters() * 4 + TINY.mixer("A").cache_bytes(1, 256, 4)
    assert len(work.calls) * one >= 2 * bench.llc_bytes


def test_bad_input():
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        prepare(TINY, dtype="int8", **ASKED)
    with pytest.raises(MachineError, match="cuda:99 is not there"):
        prepare(TINY, device="cuda:99", **ASKED)


def test_two_devices_share_a_sweep(tmp_path, monkeypatch):
    """As on two cards, with two processes of one CPU: the same rows as one measures, each once."""
    monkeypatch.setattr(sweep_module, "ROUNDS", ByDevice(cpu=1, cuda=1))
    asked = {**ASKED, "blocks": "A", "modes": ["decode"], "isolate": True}
    alone, todo = prepare(TINY, db=tmp_path, **asked), prepare(TINY, db=tmp_path, **asked, device="cpu,cpu")
    parts = todo.parts()
    assert sorted((point for part in parts for point in part.points), key=repr) == sorted(alone.points, key=repr)
    seconds = [sum(map(part.group_seconds, part.groups)) for part in parts]
    assert max(seconds) < 1.6 * min(seconds)
    assert [part.ceilings for part in parts] == [True, False]
    counts, threads = [], set()

    def progress(done, total, row):
        counts.append((done, total))
        threads.add(threading.current_thread().name)

    result = run(todo, progress)
    assert len(result.rows) == result.count("ok") == len(alone.points) + len(CEILINGS)
    assert [done for done, _ in counts] == list(range(1, len(counts) + 1))
    assert len(threads) == 3  # the ceilings are the main thread's
    assert not prepare(TINY, db=tmp_path, **asked).points


def test_unequal_cards_do_not_mix(tmp_path, monkeypatch):
    cpu = detect("cpu")
    kinds = {"cuda:0": replace(cpu, kind="cuda"), "cuda:1": replace(cpu, kind="cuda", memory_bytes=1)}
    monkeypatch.setattr(sys.modules["nasbench.devices.detect"], "detect", lambda name: kinds.get(name, cpu))
    for devices, said in (("cuda:0,cuda:1", "unequal"), ("cpu,cuda:0", "unequal"), ("cuda:0,cuda:0", "twice")):
        with pytest.raises(UserError, match=said):
            prepare(TINY, db=tmp_path, **ASKED, device=devices)
    with pytest.raises(UserError, match="in-process"):
        prepare(TINY, db=tmp_path, **ASKED, device="cpu,cpu")

    class Card:
        def __init__(self, name, watts):
            self.device, self.watts, self._nvml = name, watts, self

        nvmlDeviceGetMaxClockInfo = nvmlDeviceGetEnforcedPowerLimit = None

        def _ask(self, question, *which):
            return 1980 if which else self.watts

    assert unequal_clocks([Card("cuda:0", 700), Card("cuda:1", 700)]) == ""
    assert unequal_clocks([Card("cuda:0", 700), Card("cuda:1", 500)]).startswith("power limit of cuda:0: 700, cuda:1")


def test_noisy_rows_get_a_second_look_and_keep_the_shorter_time(tmp_path, monkeypatch):
    taken: dict[Point, int] = {}

    def fake(machine, bench, point):
        turn = taken[point] = taken.get(point, 0) + 1
        middle = {"A": 100.0 / turn, "J": 100.0 * turn}.get(point.block, 50.0)
        wide = point.block in "AJ"
        times = {"p20_us": middle / (2 if wide else 1), "p50_us": middle, "p80_us": middle}
        return Row(**point_cells(bench, machine.info, point), **times, **stamp(machine))

    monkeypatch.setattr(in_process, "measure", fake)
    asked = ASKED | {"blocks": "AJ", "contexts": [64], "batches": [1], "modes": ("decode",)}
    result = run(prepare(TINY, db=tmp_path, **asked))
    turns = {point.block: count for point, count in taken.items()}
    # Three rounds, then one of the two noisy rows again.
    assert sorted((turns["A"], turns["J"])) == [3, 4]
    assert {turns[block] for block in ("embedding", "norm", "mlp", "head")} == {3}
    kept = {row.block: row.p50_us for row in read_db(result.path)}
    assert (kept["A"], kept["J"]) == (100.0 / turns["A"], 100.0)


def test_a_limit_gives_every_group_its_part_and_leaves_the_rest_to_the_same_command(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(sweep_module.time, "monotonic", lambda: clock[0])
    budgets = []

    def fake(machine, bench, point):
        clock[0] += 1.0
        budgets.append(machine.budget.seconds)
        return Row(**point_cells(bench, machine.info, point), p20_us=1.0, p50_us=1.0, p80_us=1.0)

    monkeypatch.setattr(in_process, "measure", fake)
    monkeypatch.setattr(sweep_module, "ROUNDS", ByDevice(cpu=1))
    many = ASKED | {"blocks": ("A", "W512"), "contexts": [64, 128, 192, 256]}
    planned = prepare(TINY, db=tmp_path, **many)
    asked = many | {"seconds_per_row": 9.0}
    result = run(prepare(TINY, db=tmp_path, limit_s=20.0, **asked))
    assert (len(result.left), len(budgets)) == (len(planned.points) - 20, 20)
    assert all(LEAST_SECONDS <= seconds < 1.0 for seconds in budgets)
    left = [point for group in prepare(TINY, db=tmp_path, **many).groups for point in group]
    for group in planned.groups:
        after = [point for point in group if point in left]
        # Of every decode group the last rows, of none all; prompts have to wait.
        assert after == group[len(group) - len(after) :]
        assert (len(after) < len(group)) is any(point.mode == "decode" for point in group)
    assert run(prepare(TINY, db=tmp_path, limit_s=1e6, **many)).left == []


def test_a_block_within_other_kernels_is_a_row_of_no_time(tmp_path, monkeypatch):
    todo = prepare(TINY, db=tmp_path, **ASKED)
    monkeypatch.setattr("nasbench.profiling.measure.build", lambda bench, point: Workload([], 1, 1, reason="elsewhere"))
    row = measure(todo.machine, todo.bench, Point("norm", "decode", 1))
    assert (row.status, row.p50_us, row.noisy, row.reason) == ("ok", 0.0, False, "elsewhere")
    assert noise(row) == 0.0


def test_without_nvml_readings_are_empty():
    reading = Telemetry("cpu").read()
    assert (reading.power_w, reading.reasons) == (None, None)
    assert Telemetry("cuda").read().power_w is None or torch.cuda.is_available()


def test_other_programs_on_the_cpu_are_noticed(monkeypatch):
    quiet = [Reading(others_s=10.0), Reading(others_s=10.01)]
    busy = [Reading(others_s=10.0), Reading(others_s=12.0)]
    cores = len(os.sched_getaffinity(0))
    assert shared(*quiet, 1.0) is False
    assert shared(*busy, 10.0 / cores) is True
    assert shared(Reading(), Reading(), 1.0) is None
    before = Telemetry("cpu").read().others_s
    assert before is not None
    began = os.times()
    while os.times().user - began.user < 0.1:
        pass
    # What this process does itself is not others' work; only others may add to the difference.
    spent = os.times().elapsed - began.elapsed
    after = Telemetry("cpu").read().others_s
    assert after is not None
    assert -0.05 <= after - before <= spent * cores
    monkeypatch.setattr("nasbench.profiling.telemetry._STAT", Path("/absent"))
    assert Telemetry("cpu").read().others_s is None


@pytest.mark.slow
def test_the_sum_of_the_rows_predicts_the_decoder(tmp_path):
    """SmolLM2's shape on this machine: alone on it the mean error is below a tenth (profiles/README.md)."""
    shape = MODELS["smollm2-135m"]
    result = run(prepare(shape, "AJ", [2048], [1], ["decode"], db=tmp_path))
    costs = CostModel(read_db(result.path), shape, "fp32")
    errors = []
    for text in ("30A", "30J", "15A 15J"):
        placement = shape.parse(text)
        decoder = Decoder(shape, placement).requires_grad_(False)
        cache = decoder.new_cache(1, 2048)
        cache.fill_random(2047)
        tokens = torch.tensor([7])
        times = []
        with torch.inference_mode():
            for _ in range(12):
                cache.length = 2047
                began = time.perf_counter()
                tokens.copy_(decoder.step(tokens, cache).argmax(-1))
                times.append(time.perf_counter() - began)
        predicted = costs.decode(placement, 2048, 1).step_ms
        assert predicted is not None
        errors.append(abs(predicted / statistics.median(times[2:]) / 1e3 - 1))
    assert statistics.mean(errors) < 0.3
