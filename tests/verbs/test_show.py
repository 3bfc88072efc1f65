"""Rows on a terminal of any width: nothing is cut, and numbers stay whole."""

import json

import pytest

from vitpipe.verbs import show
from vitpipe.verbs.show import print_rows

ROWS = [
    {"name": "a_name_of_twenty_four_ch", "size": "1,234.5 GB", "what": "some words of a summary", "path": "p" * 90},
    {"name": "b", "size": "3 GB", "what": None, "path": "[red]"},
]  # fmt: skip


def shown(capsys, monkeypatch, width, **options):
    monkeypatch.setattr(show, "_PIPE_WIDTH", width)
    print_rows(ROWS, False, "A title", right=("size",), **options)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 160])
def test_nothing_is_cut_at_any_width(capsys, monkeypatch, width):
    text = shown(capsys, monkeypatch, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("p") >= 90
    for part in ("1,234.5 GB", "3 GB", "a_name_of", "summary", "[red]"):
        assert part in text


def test_rows_that_do_not_fit_stand_below_each_other(capsys, monkeypatch):
    lines = [line.rstrip() for line in shown(capsys, monkeypatch, 100).splitlines()]
    assert lines[:3] == ["A title", "a_name_of_twenty_four_ch", "size  1,234.5 GB"]
    assert lines[3] == "what  some words of a summary"
    assert lines[4] == f"path  {'p' * 90}"
    assert lines[5:] == ["b", "size  3 GB", "path  [red]"]  # an empty cell needs no line
    assert "┃" in shown(capsys, monkeypatch, 160)


def test_json_has_everything(capsys):
    print_rows(ROWS, True)
    assert json.loads(capsys.readouterr().out) == ROWS


def test_no_rows(capsys, monkeypatch):
    monkeypatch.setattr(show, "_PIPE_WIDTH", 80)
    print_rows([], False, "Nothing found")
    assert "Nothing found" in capsys.readouterr().out
