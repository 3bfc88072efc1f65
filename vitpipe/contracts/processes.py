"""A child process that ends when its parent does, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
