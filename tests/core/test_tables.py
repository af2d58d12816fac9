"""Tables of dataclasses: what is written is read back, and what is broken is named."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nasbench.core.errors import UserError
from nasbench.core.tables import read_table, write_table


@dataclass(frozen=True)
class Sample:
    name: str
    count: int
    seconds: float
    noisy: bool | None = None
    power_w: float | None = field(default=None, metadata={"formerly": "watts"})


ROW = Sample("a", 3, 0.1, True, 1.5)
HEADER = "name,count,seconds,noisy,power_w\n"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            Sample,
            st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12),
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.none() | st.booleans(),
            st.none() | st.floats(allow_nan=False, allow_infinity=False),
        )
    )
)
def test_rows_come_back_equal(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("tables") / "t.csv"
    write_table(path, rows, Sample)
    assert read_table(path, Sample) == rows


def test_an_absent_file_has_no_rows_and_an_empty_number_is_not_known(tmp_path):
    assert read_table(tmp_path / "t.csv", Sample) == []
    write_table(tmp_path / "t.csv", [Sample("a", 1, math.nan)])
    (row,) = read_table(tmp_path / "t.csv", Sample)
    assert math.isnan(row.seconds)
    assert row.power_w is None


def test_fixed_decimals(tmp_path):
    write_table(tmp_path / "t.csv", [Sample("a", 1, 1 / 3)], digits=4)
    assert (tmp_path / "t.csv").read_text() == HEADER + "a,1,0.3333,,\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: no column name"),
        ("name,count\n", "line 1: no column seconds"),
        ("name,count,seconds,mood\n", "line 1: unknown column mood"),
        ("count,name,seconds\n", "line 1: the columns are in another order"),
        (HEADER + "a,1\n", "line 2: 2 cells, the header has 5"),
        (HEADER + "a,x,1,,\n", "line 2 column count: bad value 'x': write a whole number"),
        (HEADER + "a,1,1,,\na,1,fast,,\n", "line 3 column seconds: bad value 'fast': write a number"),
        (HEADER + "a,1,1,yes,\n", "line 2 column noisy: bad value 'yes': write 0 or 1 or nothing"),
        (HEADER + "a,1,1,,\na,1", "line 3: the last line is cut"),
        (HEADER + '"a,1,1,,\n', "not CSV"),
    ],
)
def test_what_is_broken_is_named(tmp_path, text, said):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_table(path, Sample)
    assert str(path) in str(caught.value)


def test_files_of_an_older_version_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name,count,seconds,watts\na,1,2.0,3.0\n")
    assert read_table(path, Sample) == [Sample("a", 1, 2.0, None, 3.0)]


def test_other_columns_may_be_ignored(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("mood,count,name,seconds\nfine,1,a,2.0\n")
    assert read_table(path, Sample, exact=False) == [Sample("a", 1, 2.0)]


def test_a_check_names_the_column(tmp_path):
    write_table(tmp_path / "t.csv", [ROW])
    with pytest.raises(UserError, match="line 2 column count: write an even number"):
        read_table(tmp_path / "t.csv", Sample, check=lambda row: "count: write an even number" if row.count % 2 else "")
