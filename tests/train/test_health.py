"""SIGTERM becomes a request, and only while the loop runs."""

from __future__ import annotations

import os
import signal
import threading

from vitpipe.contracts.errors import StoppedError
from vitpipe.train.health import stop_on_sigterm


def test_sigterm_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before
    with stop_on_sigterm() as again:
        assert not again.requested


def test_in_another_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with stop_on_sigterm() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_the_exit_code_is_that_of_a_terminated_process():
    assert StoppedError("stopped").exit_code == 128 + signal.SIGTERM
