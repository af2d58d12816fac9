"""Repeats, percentiles and the budget, with a clock that is told what to say."""

import time

import pytest

from nasbench.runtime.timing import Budget, repeat, summarise, time_cpu


def test_percentiles():
    timing = summarise([float(i) for i in range(101)])
    assert (timing.p20_us, timing.p50_us, timing.p80_us, timing.repeats) == (20.0, 50.0, 80.0, 101)
    assert timing.scaled(0.5).p80_us == 40.0


def test_calm_samples_stop_early_and_the_first_is_thrown_away():
    samples = iter([1e6] + [100.0] * 1000)
    timing = repeat(lambda: next(samples), Budget(seconds=60, least=5, most=200))
    assert timing.repeats == 5
    assert timing.p80_us == 100.0


def test_spread_samples_use_the_budget():
    samples = iter([100.0, 200.0] * 1000)
    assert repeat(lambda: next(samples), Budget(seconds=60, least=5, most=50)).repeats == 50


def test_slow_work_stops_after_three():
    def slow() -> float:
        time.sleep(0.02)
        return 1.0

    assert repeat(slow, Budget(seconds=0.01)).repeats == 3


def test_eviction_is_not_counted():
    def nap() -> None:
        time.sleep(0.004)

    budget = Budget(seconds=0.1)
    counted = time_cpu([nap, nap], budget)
    assert counted.p50_us > 7500
    free = time_cpu([lambda: None, lambda: None], budget, evict=nap)
    assert free.p50_us < 2000


@pytest.mark.parametrize("runs", [1, 3])
def test_all_calls_are_timed(runs):
    called = []
    time_cpu([lambda: called.append(1)] * runs, Budget(seconds=0.01, least=3, most=3))
    assert len(called) == 4 * runs
