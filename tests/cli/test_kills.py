"""Every stage, harmed at random moments and started again: the result is that of an undisturbed run, and nothing is
left behind.

`KILLS=50 pytest -m slow tests/cli/test_kills.py` kills every stage 50 times; 6 times by default. Every other kill falls
into a write, at a random byte of one of the files that the stage writes. The rest fall at a random time, and writes are
made to take longer, so that about half of them fall between writing a file and giving it its name.
"""

import os
import random
import time

import pytest
from stages import STAGES, check_whole, given, names, restore, run, server, whole, written
from supernet_tiny import one_thread, text_file, tiny_model

__all__ = ["given", "one_thread", "run", "server", "text_file", "tiny_model", "whole"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
RECORDS = ("losses.csv", "progress.csv")
"""Logs of a training that is over: nothing makes them again. A recipe's stages, too, are not begun again."""
KILLS = int(os.environ.get("KILLS", "6"))
stages = pytest.mark.parametrize("stage", STAGES)


def a_size(draw, before, after):
    """A byte somewhere in a file that the stage writes."""
    sizes = list(written(before, after).values())
    return draw.randint(0, max(0, draw.choice(sizes) - 1))


def again(server, words, run, after, result):
    """The same command once more. One that overwrites nothing, and was stopped at its very end, may refuse."""
    end = server(words)
    assert end.code == 0 or (end.refused and "nothing is overwritten" in end.said), end.said
    check_whole(run, after, result)


@stages
def test_kills_change_nothing(stage, given, whole, run, server):
    words, result = STAGES[stage].words(run, given), STAGES[stage].result
    before, after, seconds = whole(stage)
    draw, killed, began = random.Random(stage), {-9: 0, -25: 0}, time.monotonic()
    while sum(killed.values()) < KILLS and time.monotonic() - began < 6600:
        restore(run, before)
        for _ in range(draw.randint(1, 3)):
            if killed[-25] <= killed[-9]:
                end = server(words, bytes=a_size(draw, before, after), torn=True)
            else:
                end = server(words, delay=draw.uniform(0.0, 1.2 * seconds))
            assert end.code in (0, -9, -25), end.said
            if end.code == 0:
                break
            killed[end.code] += 1
        again(server, words, run, after, result)
    print(f"{stage}, {seconds:.1f} s undisturbed: {killed[-9]} kills at a random time, {killed[-25]} in a write")
    assert sum(killed.values()) >= KILLS


@stages
def test_a_full_disk_is_told_in_one_line(stage, given, whole, run, server):
    words, result = STAGES[stage].words(run, given), STAGES[stage].result
    before, after, _ = whole(stage)
    draw, refused = random.Random(stage), 0
    for _ in range(KILLS):
        restore(run, before)
        end = server(words, bytes=a_size(draw, before, after))
        assert end.refused or end.code == 0, end.said
        refused += end.refused
        left = [name for name in names(run) if name.endswith(".tmp")]
        assert not left
        again(server, words, run, after, result)
    assert refused


@stages
def test_a_folder_that_nobody_may_write_is_told_in_one_line(stage, given, whole, run, server):
    words, result = STAGES[stage].words(run, given), STAGES[stage].result
    before, after, _ = whole(stage)
    restore(run, before)
    modes = {path: path.stat().st_mode for path in (run, *run.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & 0o555)
    try:
        end = server(words, powerless=True)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert end.refused, end.said
    assert "ermission denied" in end.errors[0]
    assert names(run) == names(before)
    again(server, words, run, after, result)


@stages
def test_a_truncated_file_is_made_again_or_named(stage, given, whole, run, server):
    words, result = STAGES[stage].words(run, given), STAGES[stage].result
    before, after, _ = whole(stage)
    draw, wrong = random.Random(stage), []
    for name, size in written(before, after).items():
        if name.endswith(RECORDS) or (stage == "recipe" and name.count("/") > 1):
            continue
        restore(run, after)
        os.truncate(run / name, at := draw.randrange(size) if size else 0)
        end = server(words)
        try:
            if end.code:
                assert end.refused, end.said
                assert name.rpartition("/")[2] in end.errors[0] or name.rpartition("/")[0] in end.errors[0]
            else:
                check_whole(run, after, result)
        except AssertionError as error:
            wrong.append(f"{name} cut at {at} of {size}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


@stages
def test_two_at_once(stage, given, whole, run, server):
    """One of them may be refused in a line; then the other made everything."""
    words, result = STAGES[stage].words(run, given), STAGES[stage].result
    before, after, _ = whole(stage)
    restore(run, before)
    ends = server(words, copies=2)
    assert any(end.code == 0 for end in ends), [end.said for end in ends]
    assert all(end.code == 0 or end.refused for end in ends), [end.said for end in ends]
    check_whole(run, after, result)
