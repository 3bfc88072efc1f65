"""How processes end: a child when its parent does, however that one ends; a parent of children in order."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The number of the process that a stage shall die with, although others may stand between the two.
TIED_VARIABLE = "VITPIPE_DIES_WITH"


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, `kill -9` included. Linux only.

    Without it a loader process whose trainer was killed blocks for ever on a full pipe (it holds the read end
    itself), with its memory and with every file that it inherited.

    Args:
        parent: its process number as the parent knew it; a parent that has died already is noticed, too.
    """
    if not sys.platform.startswith("linux"):
        return
    # No binding in the standard library. The flag is not inherited across fork, so each worker sets its own.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died between fork and prctl: the kernel then never sends the signal.
    if os.getppid() != parent:
        os._exit(1)


def die_with_ancestor(number: int) -> None:
    """Kill this process when process `number` dies, its parent or not. Linux 5.3 or later, else nothing.

    The kernel ties a process to its parent only. Between DVC and a stage there may be a shell that waits for
    it: bash turns into the only command that it is given, dash stays.

    A new program (exec) ends the watch.
    """
    try:
        watched = os.pidfd_open(number)
    except ProcessLookupError:
        os._exit(1)
    except (AttributeError, OSError):  # another system, an older kernel
        return

    def wait_for_its_end() -> None:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_its_end, name="die_with_ancestor", daemon=True).start()


def start_reading(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a child in a session of its own, whose whole output is read from its `stdout` line by line.

    Ctrl-C in a terminal goes to every process of its group: here the parent alone decides what a child gets.

    Args:
        environment: variables beside those of this process.
    """
    return subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within it, SIGTERM raises KeyboardInterrupt(SIGTERM): one way to end child processes in order."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
