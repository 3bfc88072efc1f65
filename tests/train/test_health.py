"""SIGTERM and Ctrl-C become requests, and only while the loop runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vitpipe.contracts.errors import StoppedError
from vitpipe.train.health import StopRequest, stop_on_signals, stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        error = stopped(stop, Path("state"), 3, 9)
    assert signal.getsignal(number) is before
    assert error.exit_code == 128 + number
    assert f"Stopped by {number.name} after step 3 of 9; the state is saved" in str(error)
    with stop_on_signals() as again:
        assert not again.requested


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def test_a_second_ctrl_c_stops_at_once():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            _interrupt()


def test_a_rank_that_got_no_signal_says_so():
    assert "a signal to another rank" in str(stopped(StopRequest(), Path("state"), 3, 9))


def test_in_another_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with stop_on_signals() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_the_exit_code_is_that_of_a_terminated_process():
    assert StoppedError("stopped").exit_code == 128 + signal.SIGTERM
