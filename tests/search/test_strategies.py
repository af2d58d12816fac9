"""Every strategy on an objective whose best placements are known by enumeration."""

import itertools
import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from search.synthetic import SyntheticObjective, search

from nasbench.core.errors import UserError
from nasbench.search import program
from nasbench.search.program import Program
from nasbench.search.session import baselines, run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import TEACHER, UNIFORM, add_trials, read_trials
from nasbench.spaces.space import Space, count_full

EVERY = [name for name in STRATEGIES if name != "optuna-gp"]
NO_SCIPY = pytest.mark.skipif(not find_spec("scipy"), reason="scipy is not installed")
SLOW = pytest.param("optuna-gp", marks=[pytest.mark.slow, NO_SCIPY])


def enumerate_best(run, count):
    """The least loss over every set of `count` full layers with the base's fillers."""
    layers = range(run.space.num_layers)
    return min(run.objective.loss(run.with_full(full)) for full in itertools.combinations(layers, count))


@pytest.mark.parametrize("strategy", [*EVERY, SLOW])
def test_every_strategy_meets_the_contract(tmp_path, strategy):
    """Legal placements of the wanted K, within the budget, baselines included, and a second run asks nothing new."""
    run = search(tmp_path, full_attention=(2, 4), evaluations=30)
    compared = run_search(run, strategy)
    assert [row.k for row in compared] == [2, 4]
    assert all(row.searched.loss <= row.uniform.loss for row in compared)
    trials = read_trials(run.path)
    assert {TEACHER, UNIFORM, strategy} <= {trial.strategy for trial in trials}
    mine = [trial for trial in trials if trial.strategy == strategy != UNIFORM]
    assert len(mine) <= 30
    if strategy not in ("beam", "kl-greedy", "greedy-swap", "kl-remove"):  # which pass through other K
        assert {trial.k for trial in mine} <= {2, 4}
    for trial in trials:
        run.space.check(trial.layers)
        assert trial.loss == run.objective.loss(trial.layers)
        assert trial.score == trial.kl == run.objective.kl(trial.layers)
        assert trial.k == count_full(trial.layers)

    again = search(tmp_path, full_attention=(2, 4), evaluations=30)
    run_search(again, strategy)
    assert again.objective.asked == []


@pytest.mark.parametrize("seed", range(4))
def test_beam_finds_the_optimum_or_comes_close(tmp_path, seed):
    run = search(tmp_path, SyntheticObjective(seed=seed), full_attention=(2, 4, 6), evaluations=150)
    for row in run_search(run, "beam"):
        least = enumerate_best(run, row.k)
        assert row.searched.loss - least <= 0.1 * (row.uniform.loss - least)


def test_same_seed_same_result(tmp_path):
    for strategy in EVERY:
        tried = []
        for folder in ("one", "two"):
            run = search(tmp_path / strategy / folder, full_attention=(3,), evaluations=16, seed=5)
            run_search(run, strategy)
            tried.append([(t.strategy, t.placement, t.score) for t in run.trials()])
        assert tried[0] == tried[1], strategy


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("nasbench.search.optuna_study.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optuna-gp needs scipy: pip install scipy"):
        run_search(search(tmp_path, full_attention=(2,)), "optuna-gp")


def test_kl_remove_takes_the_layer_that_is_missed_least(tmp_path):
    run = search(tmp_path, SyntheticObjective(seed=2), full_attention=(9,), evaluations=100)
    run_search(run, "kl-remove")
    left = frozenset(range(12))
    for _ in range(3):
        left = min((left - {i} for i in left), key=lambda layers: run.objective.loss(run.with_full(layers)))
    mine = [trial for trial in run.trials() if trial.k == 9 and trial.strategy == "kl-remove"]
    assert min(mine, key=lambda t: t.kl).layers == run.with_full(left)


def test_sampled_beats_random_with_the_same_budget(tmp_path):
    wins = 0
    for seed in range(4):
        best = []
        for strategy in ("sampled", "random"):
            run = search(
                tmp_path / f"{strategy}{seed}", SyntheticObjective(20, seed=seed), full_attention=(6,), evaluations=60
            )
            run_search(run, strategy)
            best.append(min(t.loss for t in run.trials() if t.strategy == strategy))
        wins += best[0] < best[1]
    assert wins == 4


def test_kl_greedy_restores_the_layer_that_lowers_the_kl_most(tmp_path):
    class Divergence(SyntheticObjective):
        def kl(self, placement):
            return self.loss(placement)

    run = search(tmp_path, Divergence(seed=2), full_attention=(3,), evaluations=100)
    run_search(run, "kl-greedy")
    chosen = frozenset()
    for _ in range(3):
        sets = [chosen | {i} for i in range(12) if i not in chosen]
        chosen = min(sets, key=lambda layers: run.objective.loss(run.with_full(layers)))
    best = min((trial for trial in run.trials() if trial.k == 3 and trial.strategy == "kl-greedy"), key=lambda t: t.kl)
    assert best.layers == run.with_full(chosen)


@pytest.mark.parametrize("evaluations", [1, 5, 20])
def test_beam_is_never_above_uniform_however_small_the_budget(tmp_path, evaluations):
    run = search(tmp_path, SyntheticObjective(seed=3), full_attention=(3, 5), evaluations=evaluations)
    for row in run_search(run, "beam"):
        assert row.searched.loss <= row.uniform.loss
    assert sum(trial.strategy == "beam" for trial in run.trials()) <= evaluations


def test_beam_beats_random_with_the_same_budget(tmp_path):
    wins = 0
    for seed in range(5):
        losses = {}
        for strategy in ("beam", "random"):
            run = search(
                tmp_path / f"{strategy}{seed}", SyntheticObjective(20, seed=seed), full_attention=(6,), evaluations=60
            )
            run_search(run, strategy)
            losses[strategy] = min(t.loss for t in run.trials() if t.strategy == strategy and t.k == 6)
        wins += losses["beam"] < losses["random"]
    assert wins == 5


def test_a_stopped_search_goes_on_where_it_stopped(tmp_path):
    """The trials of a search that stopped half-way and ran again are those of one that did not stop."""

    class Stopping(SyntheticObjective):
        def measure(self, placements):
            if len(self.asked) + len(placements) > 25:
                raise KeyboardInterrupt
            return super().measure(placements)

    whole = search(tmp_path / "whole", full_attention=(2, 4), evaluations=60)
    run_search(whole, "beam")
    with pytest.raises(KeyboardInterrupt):
        run_search(search(tmp_path / "halves", Stopping(), full_attention=(2, 4), evaluations=60), "beam")
    second = search(tmp_path / "halves", full_attention=(2, 4), evaluations=60)
    run_search(second, "beam")
    assert [(t.strategy, t.placement, t.loss) for t in second.trials()] == [
        (t.strategy, t.placement, t.loss) for t in whole.trials()
    ]
    assert len(second.objective.asked) < len(whole.objective.asked)


def test_optuna_study_resumes_in_its_storage(tmp_path):
    first = search(tmp_path, evaluations=20)
    run_search(first, "optuna")
    seen = {t.placement for t in first.trials() if t.strategy == "optuna"}
    second = search(tmp_path, evaluations=40)
    run_search(second, "optuna")
    after = {t.placement for t in second.trials() if t.strategy == "optuna"}
    assert seen < after
    assert len(after) <= 40
    assert len(second.objective.asked) == len(after - seen)


def test_optuna_starts_from_the_beams_placements(tmp_path):
    run_search(search(tmp_path, full_attention=(4,), evaluations=40), "beam")
    run = search(tmp_path, full_attention=(4,), evaluations=10)
    run_search(run, "optuna")
    best = min((t for t in run.trials() if t.strategy == "beam" and t.k == 4), key=lambda t: t.loss)
    assert best.placement in {t.placement for t in run.trials() if t.strategy == "optuna"}


def test_optuna_without_k_covers_speeds(tmp_path):
    run = search(tmp_path, evaluations=60)
    run_search(run, "optuna")
    assert len({t.k for t in run.trials() if t.strategy == "optuna"}) >= 4


def test_bad_storage_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nosuch"):
        run_search(search(tmp_path, evaluations=5, storage="nosuch://x"), "optuna")


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_exact_is_the_least_sum(count):
    objective = SyntheticObjective(6)
    increases = dict(objective.importance(("W", "J")))

    def total(placement):
        return sum(increases.get(key, 0.0) for key in enumerate(placement))

    legal = (p for p in itertools.product("AWJ", repeat=6) if p.count("A") == count)
    least = min(total(p) for p in legal)
    program = Program(objective.space.choices)
    found = program.solve(np.array([increases.get(key, 0.0) for key in program.keys]), count=count)
    assert total(found.placement) == pytest.approx(least)
    assert found.score == pytest.approx(found.least) == pytest.approx(least)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_attention": (13,)}, "13 full-attention layers asked of 12"),
        ({"replacement": "X"}, "unknown replacement 'X': choose from J, W"),
        ({"replacement": "A"}, "unknown replacement"),
        ({"evaluations": 0}, "evaluations is 0"),
        ({"beam_width": 0}, "beam width is 0"),
        ({"seconds": -1.0}, "bad --seconds -1"),
        ({"random": -1}, "bad --random -1"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        search(tmp_path, **options)


def test_unknown_strategy_and_missing_k(tmp_path):
    with pytest.raises(UserError, match="did you mean 'beam'"):
        run_search(search(tmp_path), "beems")
    for strategy in ("beam", "kl-greedy", "greedy-swap", "kl-remove", "one-swap"):
        with pytest.raises(UserError, match="--full-attention"):
            run_search(search(tmp_path), strategy)


def test_a_filler_asked_for_is_the_only_one(tmp_path):
    for strategy in ("beam", "optuna", "exact", "random", "sampled", "kl-remove"):
        run = search(tmp_path / strategy, full_attention=(3,), replacement="J", evaluations=15)
        run_search(run, strategy)
        assert {name for t in run.trials() for name in t.layers} == {"A", "J"}


def test_strategies_extend_by_registering(tmp_path):
    def everything_fast(run):
        run.evaluate([run.base], "fast")

    STRATEGIES.register("fast", everything_fast)
    try:
        run = search(tmp_path, full_attention=(1,))
        run_search(run, "fast")
        assert "fast" in {t.strategy for t in run.trials()}
    finally:
        del STRATEGIES._items["fast"]


def test_new_weights_are_evaluated_anew(tmp_path):
    run_search(search(tmp_path, full_attention=(2,)), "uniform")
    run = search(tmp_path, SyntheticObjective(version="v2"), full_attention=(2,))
    run_search(run, "uniform")
    assert len(run.objective.asked) > 0
    assert {t.supernet for t in run.trials()} == {"v2"}


def test_a_kind_that_is_slower_than_full_attention_is_no_filler(tmp_path, monkeypatch):
    from search import synthetic

    monkeypatch.setitem(synthetic.MS, "J", 1.5)
    for strategy in ("beam", "exact", "optuna", "random", "uniform"):
        run = search(tmp_path / strategy, full_attention=(3,), evaluations=12)
        run_search(run, strategy)
        assert {name for t in run.trials() for name in t.layers} == {"A", "W"}
    asked = search(tmp_path / "asked", full_attention=(3,), evaluations=12, replacement="J")
    run_search(asked, "beam")
    assert {name for t in asked.trials() for name in t.layers} == {"A", "J"}
    monkeypatch.setitem(synthetic.MS, "W", 1.5)
    assert search(tmp_path / "none").faster == ("W", "J")


def test_a_solver_prints_nothing_on_standard_output(capfd):
    """Its banner comes before any option could silence it."""
    program._solver.cache_clear()
    own = program.Program(SyntheticObjective(4).space.choices)
    assert own.solve(np.ones(len(own.keys)), count=1) is not None
    assert capfd.readouterr().out == ""


def journal_of(folder):
    run_search(search(folder, evaluations=16), "optuna")
    return folder / "optuna.journal"


def complete_trials(lines):
    return sum(json.loads(line).get("op_code") == 6 and json.loads(line)["state"] == 1 for line in lines)


@pytest.mark.parametrize("appended", [0, 3])
def test_a_torn_journal_is_cut_back_to_its_last_whole_line(tmp_path, caplog, appended):
    """Of a worker that was killed, also where another appended to its half line before."""
    import optuna

    path = journal_of(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    torn = len(lines) - 2
    path.write_bytes(b"".join(lines[:torn]) + lines[torn][:40] + b"".join(lines[:appended]))
    run = search(tmp_path, evaluations=24)
    run_search(run, "optuna")
    assert f"cut back before line {torn + 1}" in caplog.text
    assert path.read_bytes().startswith(b"".join(lines[:torn]))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    done = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) > complete_trials(lines[:torn]) > 0


def test_random_placements_are_baselines(tmp_path):
    run = search(tmp_path, full_attention=(0, 3, 12), random=3, evaluations=8)
    run_search(run, "uniform")
    drawn = {t.strategy: t for t in run.trials() if t.strategy.startswith("random-")}
    assert list(drawn) == ["random-0", "random-1", "random-2"]
    assert len({t.placement for t in drawn.values()}) == 3
    assert all(t.k == 3 and set(t.layers) <= {"A", *run.base} for t in drawn.values())
    again = search(tmp_path / "again", full_attention=(2, 3), random=1, evaluations=8)
    run_search(again, "uniform")
    assert drawn["random-0"].placement in {t.placement for t in again.trials()}


def test_a_time_becomes_evaluations_by_what_the_baselines_took(tmp_path):
    run = search(tmp_path, full_attention=(2, 4), seconds=2.0)
    baselines(run)
    trials = [replace(trial, seconds=0.05) for trial in run.trials()]
    run.path.unlink()
    add_trials(run.path, trials)
    run_search(run, "kl-greedy")
    assert run.options.evaluations == 40
    assert 16 < len([t for t in run.trials() if t.strategy == "kl-greedy"]) <= 40
    again = search(tmp_path, full_attention=(2, 4), seconds=0.1)
    run_search(again, "kl-greedy")
    assert again.options.evaluations == 16
    assert again.objective.asked == []


def gemma(layers=9):
    """Every third layer has full attention; the others are windows in the model itself."""
    original = tuple("A" if i % 3 == 2 else "W" for i in range(layers))
    return SyntheticObjective(space=Space.around(original, ("A", "W", "J")))


@pytest.mark.parametrize("strategy", EVERY)
def test_a_model_with_windows_of_its_own(tmp_path, strategy):
    """K counts the layers that keep full attention, and only those that have it may."""
    run = search(tmp_path, gemma(), full_attention=(0, 1, 2), evaluations=30)
    for row in run_search(run, strategy):
        assert row.searched.score <= row.uniform.score
    trials = run.trials()
    assert [run.base[i] for i in range(9) if i % 3 != 2] == ["W"] * 6
    assert trials[0].k == 3
    for trial in trials:
        run.space.check(trial.layers)
        assert trial.k == trial.layers.count("A")
    with pytest.raises(UserError, match="4 full-attention layers asked of 3"):
        search(tmp_path, gemma(), full_attention=(4,))
    if strategy == "exact":
        best = min(itertools.product(*run.space.choices), key=lambda p: (p.count("A") != 1, run.objective.loss(p)))
        assert best.count("A") == 1
