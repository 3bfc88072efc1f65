"""Numbers with units: the examples that tables, plans and progress lines show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.units import (
    counted,
    format_billions,
    format_bytes,
    format_count,
    format_duration,
    format_millions,
)


@pytest.mark.parametrize(
    ("size", "binary", "text"),
    [
        (0, False, "0 kB"),
        (12_345, False, "12 kB"),
        (967e6, False, "967.0 MB"),
        (154.6e9, False, "154.6 GB"),
        (1.31e12, False, "1.31 TB"),
        (24 * 2**30, True, "24.0 GiB"),
        (64 * 2**20, True, "64.0 MiB"),
        (2**11, True, "2 KiB"),
    ],
)
def test_bytes(size, binary, text):
    assert format_bytes(size, binary=binary) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.04, "0.0 s"), (0.4, "0.4 s"), (5, "5 s"), (9.96, "10 s"), (42.4, "42 s"), (59.6, "1 min 00 s"),
        (185, "3 min 05 s"), (7800, "2 h 10 min"), (442_800, "5 d 3 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_counts():
    assert format_count(14_197_122) == "14,197,122"


@pytest.mark.parametrize(
    ("number", "text"),
    [(219_380, "0.22 M"), (86.4e6, "86.4 M"), (79e6, "79 M"), (2_157_600_160, "2,158 M"), (900, "0.0009 M"), (0, "0 M")],
)  # fmt: skip
def test_parameters_and_multiply_adds(number, text):
    assert format_millions(number) == text
    assert format_billions(number * 1000) == text.replace("M", "G")


def test_a_count_and_its_noun():
    assert counted(1, "file") == "1 file"
    assert counted(0, "file") == "0 files"
    assert counted(1024, "leftover folder") == "1,024 leftover folders"
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


@given(st.floats(0, 1e9))
def test_no_duration_shows_sixty_of_anything(seconds):
    assert "60" not in format_duration(seconds).replace(" d", "").split(" ")[-2:]
