"""The profile database: what is written is read back, what is broken is named, and no fault loses a row."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nasbench import store
from nasbench.core.errors import MachineError, UserError
from nasbench.store import COLUMNS, KEY, Database, Row, db_path, read_db, select


def row(**cells) -> Row:
    defaults = {
        "device": "dev",
        "block": "A",
        "p20_us": 1.0,
        "p50_us": 2.0,
        "p80_us": 3.0,
        "context": 1024,
        "measured_utc": "2026-01-01T00:00:00Z",
    }
    return Row(**(defaults | cells))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "dev.csv"


def rewrite(path: Path, line: int, column: str, value: str) -> None:
    """Changes one cell; line 1 is the header."""
    lines = list(csv.reader(path.open()))
    lines[line - 1][COLUMNS.index(column)] = value
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def test_the_header_is_the_schema(path):
    Database(path).merge([row()])
    assert path.read_text().splitlines()[0].split(",") == list(COLUMNS)
    assert COLUMNS[0] == "schema"
    assert KEY[0] == "device"
    assert {"block", "mode", "dtype", "batch", "context", "chunk", "implementation"} <= set(KEY)


def test_rows_come_back_sorted_and_equal(path):
    rows = [
        row(context=context, batch=batch, throttled=flag, reason='a, "b"', power_w=12.3456, repeats=7, status="ok")
        for context, batch, flag in ((4096, 1, True), (1024, 4, None), (1024, 1, False))
    ]
    assert Database(path).merge(rows) == 3
    found = read_db(path)
    assert [(r.batch, r.context) for r in found] == [(1, 1024), (1, 4096), (4, 1024)]
    assert set(found) == set(rows)


@settings(max_examples=30, deadline=None)
@given(
    number=st.none() | st.floats(0, 1e9, allow_nan=False),
    text=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), max_size=20),
    throttled=st.none() | st.booleans(),
)
def test_any_cell_survives(tmp_path_factory, number, text, throttled):
    path = tmp_path_factory.mktemp("db") / "dev.csv"
    Database(path).merge([row(gb_s=number, reason=text, throttled=throttled)])
    (found,) = read_db(path)
    assert found.gb_s == (None if number is None else pytest.approx(number, abs=5e-5))
    assert (found.reason, found.throttled) == (text, throttled)


def test_merging_the_same_changes_no_byte(path):
    Database(path).merge([row(), row(batch=4)])
    before = path.read_bytes()
    assert Database(path).merge(read_db(path)) == 0
    assert path.read_bytes() == before


def test_which_row_of_a_key_stays(path):
    database = Database(path)
    old = row(p50_us=2.0)
    later = replace(old, p50_us=2.5, measured_utc="2026-02-01T00:00:00Z")
    estimate = replace(old, source="estimated", p50_us=2.9, measured_utc="2026-03-01T00:00:00Z")
    failed = replace(old, status="failed", p20_us=None, p50_us=None, p80_us=None, measured_utc="2026-03-01T00:00:00Z")
    database.merge([estimate])
    database.merge([old])
    assert read_db(path)[0].source == "measured"
    for worse in (estimate, failed):
        assert database.merge([worse]) == 0
    assert database.merge([later]) == 1
    assert database.merge([old]) == 0
    assert read_db(path)[0].p50_us == 2.5


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("batch", "x", "whole number"),
        ("batch", "-1", "whole number"),
        ("batch", "0", "at least 1"),
        ("p50_us", "fast", "write a number"),
        ("p50_us", "nan", "finite"),
        ("p50_us", "9.0", "not between"),
        ("p50_us", "", "needs its times"),
        ("throttled", "maybe", "0 or 1 or nothing"),
        ("mode", "train", "decode, prefill"),
        ("status", "great", "failed, ok, oom"),
        ("source", "guessed", "estimated, measured"),
        ("device", "", "bad device name"),
        ("chunk", "512", "decode row has 0"),
        ("schema", "99", f"the header is of schema {store.SCHEMA}"),
    ],
)
def test_a_bad_cell_is_named_by_file_line_and_column(path, column, value, said):
    Database(path).merge([row(), row(batch=4)])
    rewrite(path, 3, column, value)
    with pytest.raises(UserError, match=said) as caught:
        read_db(path)
    assert str(path) in str(caught.value)
    assert "line 3" in str(caught.value)
    assert f"column {column}" in str(caught.value)


def test_broken_files_are_refused(path):
    Database(path).merge([row(), row(batch=4)])
    whole = path.read_text()
    header, first, second = whole.splitlines()
    cases = {
        "": "not the header",
        "a,b\n1,2\n": "not the header",
        whole[:-5]: "the last line is cut",
        f"{header}\n{first}\n{second.rsplit(',', 3)[0]}\n": "line 3: 43 cells",
        f"{header}\n{first}\n{second}\n{first}\n": "line 4: the same key as line 2",
        whole.replace("p80_us", "p90_us", 1): "no column p80_us; unknown column p90_us",
        f'{header}\n"{first}\n': "not CSV",
    }
    for text, said in cases.items():
        path.write_text(text)
        with pytest.raises(UserError, match=said.replace("43", r"\d+")):
            read_db(path)
        # Nobody merges into a file that cannot be read: it would be lost.
        with pytest.raises(UserError):
            Database(path).merge([row(batch=8)])
        assert path.read_text() == text
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_db(path)
    with pytest.raises(UserError, match="no such profile database"):
        read_db(path.with_name("absent.csv"))


NEW_SINCE_1 = ("noisy", "throttle_reasons", "host_us", "kernels", "numa_node")


def older(path: Path) -> str:
    """The same file as schema 1 had it."""
    lines = list(csv.DictReader(path.open()))
    with path.open("w", newline="") as file:
        names = dict(zip(store.columns_of(1), [name for name in COLUMNS if name not in NEW_SINCE_1], strict=True))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([(line | {"schema": "1"})[now] for now in names.values()] for line in lines)
    return path.read_text()


def test_an_older_schema_is_read_and_becomes_the_present_one(path):
    rows = [row(noisy=True), row(batch=4, p20_us=1.99, p80_us=2.01, noisy=False)]
    Database(path).merge(rows)
    now = path.read_bytes()
    older(path)
    assert (store.schema_of(path), read_db(path)) == (1, rows)
    assert Database(path).migrate()
    assert path.read_bytes() == now
    assert (store.schema_of(path), Database(path).migrate()) == (store.SCHEMA, False)
    # A change writes the present schema too, and loses nothing.
    older(path)
    assert Database(path).merge([row(batch=8)]) == 1
    assert read_db(path) == [*rows, row(batch=8)]
    assert store.schema_of(path) == store.SCHEMA


def test_a_newer_schema_is_refused_with_what_to_do(path):
    Database(path).merge([row()])
    newer = store.SCHEMA + 1
    text = path.read_text().replace("schema,", "schema,soul,", 1).replace(f"\n{store.SCHEMA},", f"\n{newer},1,")
    path.write_text(text)
    with pytest.raises(UserError, match=rf"schema {newer} is of a newer nasbench, .*`pip install -U nasbench`"):
        Database(path).merge([row(batch=2)])
    assert path.read_text() == text


def test_a_bad_row_is_not_written(path):
    with pytest.raises(UserError, match="needs its times"):
        Database(path).merge([row(p50_us=None)])
    assert not path.exists()


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    Database(path).merge([row()])
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nasbench.core.files.os.fsync", full)
    with pytest.raises(MachineError, match="no space left"):
        Database(path).merge([row(batch=4)])
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp")) + list(path.parent.glob(".*.tmp"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="file"):
        Database(tmp_path / "file" / "dev.csv").merge([row()])


WRITER = """
import sys
from pathlib import Path
from nasbench.store import Database, Row
path, begin, count, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
for turn in range(rounds):
    rows = [Row(device="dev", block="A", context=begin + i, p20_us=1.0, p50_us=2.0, p80_us=3.0,
                measured_utc=f"2026-01-01T00:00:{turn:06d}Z") for i in range(count)]
    for row in (rows if count < 50 else [rows]):
        Database(path).merge([row] if count < 50 else rows)
    print(turn, flush=True)
"""


def start_writer(path: Path, *numbers: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), *map(str, numbers)]
    root = str(Path(store.__file__).parents[1])
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root})


def test_two_writers_lose_nothing(path):
    writers = [start_writer(path, begin, 20, 1) for begin in (1, 1001)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    contexts = {r.context for r in read_db(path)}
    assert contexts == {*range(1, 21), *range(1001, 1021)}


def test_a_killed_writer_leaves_a_whole_file(path):
    Database(path).merge([row(context=999_999)])
    for delay in (0.0, 0.013, 0.029):
        writer = start_writer(path, 1, 500, 100_000)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
        writer.stdout.close()
        assert len(read_db(path)) == 501
    # The lock of the dead is not held.
    assert Database(path).merge([row(context=999_998)]) == 1


def test_select():
    rows = [row(), row(mode="prefill", chunk=512)]
    assert select(rows, mode="prefill", chunk=512) == rows[1:]


def test_only_a_norm_may_take_no_time(path):
    nothing = {"p20_us": 0.0, "p50_us": 0.0, "p80_us": 0.0}
    Database(path).merge([row(block="norm", context=0, **nothing)])
    assert read_db(path)[0].p50_us == 0.0
    with pytest.raises(UserError, match="one is zero"):
        Database(path).merge([row(**nothing)])


@pytest.mark.parametrize("device", ["../escaped", "/tmp/escaped", "a/b", "..", ".hidden", "a b", ""])
def test_a_device_name_cannot_leave_the_folder(path, device):
    with pytest.raises(UserError, match="device"):
        Database(path).merge([row(device=device)])
    with pytest.raises(UserError, match="bad device name"):
        db_path(device, path.parent)
