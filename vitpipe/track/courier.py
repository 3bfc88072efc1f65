"""The courier: a process beside the stage that brings its box to MLflow while it is being filled.

Importing MLflow costs three seconds and a quarter of a gigabyte, and a server may be slow or gone; the
training process is spared all of that. It only writes the journal and says "look again" on a pipe. When
the pipe ends, the stage is over: the courier sends what is left and goes. A stage that was killed cannot
say so, but its pipe ends all the same, and the run is marked KILLED.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import vitpipe
from vitpipe.track.box import Box, Contact

LOG = "courier.log"
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_END = b"end\n"


class Courier:
    """The stage's handle on its courier. A courier that dies changes nothing for the stage."""

    def __init__(self, box: Box) -> None:
        box.write_contact(None)
        root = str(Path(vitpipe.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        with (box.folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vitpipe.track.courier", str(box.folder.resolve())],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self._box = box

    def wake(self) -> None:
        """There is something new to send."""
        self._tell(b"look\n")

    def wait_for_contact(self, seconds: float) -> Contact | None:
        """Wait until MLflow has answered or not; None when even that is not known in time."""
        until = time.monotonic() + seconds
        while (contact := self._box.contact()) is None and time.monotonic() < until:
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        return contact

    def finish(self, seconds: float) -> None:
        """Let it send what is left and go; after `seconds` it is stopped."""
        # A word and not only the end of the pipe: forked loader workers may hold the pipe open.
        self._tell(_END)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it is gone; the box is kept
            if self._process.stdin is not None and not self._process.stdin.closed:
                self._process.stdin.write(word)
                self._process.stdin.flush()


def carry(box: Box, words: IO[bytes]) -> bool:
    """Send the box again and again until `words` end; pauses grow while MLflow does not answer.

    Returns:
        Whether everything was sent.
    """
    from vitpipe.track.send import Delivery
    from vitpipe.track.store import StoreError

    delivery = Delivery(box)
    pause, is_over, is_sent = 0.0, False, False
    while True:
        try:
            delivery.sync()
            if is_over:
                delivery.mark_killed()
            is_sent, pause = True, 0.0
            box.write_contact(Contact(reached=True))
        except StoreError as error:
            is_sent, pause = False, min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            box.write_contact(Contact(reached=False, reason=error.what))
            print(error, file=sys.stderr, flush=True)
        if is_over:
            return is_sent
        is_over = _next_word(words, pause or None)


def _next_word(words: IO[bytes], seconds: float | None) -> bool:
    """Wait for a word, at most `seconds`; True when it was the last one."""
    ready, _, _ = select.select([words], [], [], seconds)
    if not ready:
        return False
    said = os.read(words.fileno(), 65536)
    return not said or said.endswith(_END)


def main() -> None:
    """Carry one box, then those that finished stages left behind beside it."""
    from vitpipe.track.send import UNSENT_SUFFIX, send_pending
    from vitpipe.track.store import StoreError

    box = Box(Path(sys.argv[1]))
    with box.locked(wait=True):
        is_sent = carry(box, sys.stdin.buffer)
    # box.folder is OUTPUTS/.STAGE.state/track: leftovers lie in OUTPUTS.
    for place in box.folder.parent.parent.glob(f".*{UNSENT_SUFFIX}") if is_sent else ():
        try:
            send_pending(place)
        except StoreError as error:
            print(error, file=sys.stderr)
    sys.exit(0 if is_sent else 1)


if __name__ == "__main__":
    main()
