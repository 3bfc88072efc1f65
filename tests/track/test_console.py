"""Progress in a log file (a plain line every few seconds, and always the last one) and on a terminal."""

from __future__ import annotations

import io

from vitpipe.track import console
from vitpipe.track.console import Console


def test_a_log_gets_lines_at_intervals_and_the_last_one(capsys, monkeypatch):
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    shown = Console("pretrain")
    for step in range(1, 21):
        shown.progress(step, 20, {"loss": 1 / step})
    lines = capsys.readouterr().out.splitlines()
    assert 2 < len(lines) < 20
    assert lines[-1] == "pretrain: step 20/20 (100%)  loss 0.05"
    assert "left" in lines[0]


def test_no_time_is_promised_before_the_pace_is_known(capsys, monkeypatch):
    clock = iter((0.0, 100.0, 100.0, 100.0, 120.0, 120.0, 120.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    shown = Console("pretrain")
    shown.progress(5, 25, {"loss": 1.0})
    shown.progress(15, 25, {"loss": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "pretrain: step 5/25 (20%)  loss 1",
        "pretrain: step 15/25 (60%)  loss 0.5  20 s left",
    ]


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    shown = Console("pretrain")
    shown.progress(1, 4, {"loss": 2.0})
    shown.say("saved [1/4]")
    shown.progress(4, 4, {"loss": 1.0})
    shown.close()
    text = screen.getvalue()
    assert "pretrain" in text
    assert "4/4" in text
    assert "saved [1/4]" in text
