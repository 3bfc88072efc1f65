"""The uploader: a process beside the stage that brings its outbox to MLflow while it is being filled.

Importing MLflow costs three seconds and a quarter of a gigabyte, and a server may be slow or gone; the
training process is spared all of that. It only writes the journal and says "look again" on a pipe.

The stage says "end" when it is over: the uploader sends what is left and goes. A stage that was killed
cannot say so, and its pipe need not end, because loader workers that it forked may live on and hold the
other end. So the uploader also watches whether the stage is still its parent. After the stage's death it
sends what is final, marks the run KILLED, and is gone at the latest after `GRACE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import vitpipe
from vitpipe.contracts.address import Address, hidden
from vitpipe.contracts.errors import StorageError
from vitpipe.track.outbox import Contact, Outbox
from vitpipe.track.producer import Producer
from vitpipe.track.refusal import TrackingError
from vitpipe.track.server import URI, is_server

LOG = "uploader.log"
GRACE_SECONDS = 24.0
# How long a stage waits in all for a server that says nothing, and at least for a last try at its end.
PATIENCE_SECONDS, LAST_TRY_SECONDS = 6.0, 2.0
START_SECONDS = 20.0  # for the uploader itself to start, on a machine that is busy
FINISH_SECONDS, STALLED_SECONDS = 120.0, 60.0  # while MLflow answers: in all, and without anything being sent
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
_LOOK_SECONDS, _SIGN_OF_LIFE_SECONDS, _TICK_SECONDS = 1.0, 30.0, 0.05
_END = b"end\n"


class Uploader:
    """The stage's handle on its uploader. A uploader that dies changes nothing for the stage.

    Args:
        store: with credentials, which the uploader is given in its environment.
    """

    def __init__(self, outbox: Outbox, store: Address) -> None:
        outbox.write_contact(None)
        producer = Producer.of_this_process().model_dump_json()
        with (outbox.folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vitpipe.track.uploader", str(outbox.folder.resolve()), producer],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env=_environment(store),
            )  # fmt: skip
        self._box, self._store = outbox, store
        self._patience, self._start = PATIENCE_SECONDS, START_SECONDS

    def wake(self) -> None:
        """There is something new to send."""
        self._tell(b"look\n")

    def contact(self) -> Contact | None:
        """Whether MLflow answers this uploader; an earlier one may still write into the same outbox."""
        contact = self._box.contact()
        return contact if contact is not None and contact.pid == self._process.pid else None

    def wait_for_run(self, seconds: float) -> None:
        """Wait until MLflow has given the run a number, `seconds` at most; hardly, while it says nothing."""

        def is_known() -> bool:
            contact = self.contact()
            return bool(self._box.run_id) or (contact is not None and bool(contact.reason))

        self._wait(is_known, seconds, seconds)

    def finish(self) -> None:
        """Let it send what is left and go; stop it when MLflow does not answer or takes nothing any more."""
        self._tell(_END)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._patience = max(self._patience, LAST_TRY_SECONDS)
        self._wait(lambda: False, FINISH_SECONDS, STALLED_SECONDS)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _wait(self, is_done: Callable[[], bool], seconds: float, stalled_seconds: float) -> None:
        """Wait for the uploader; long only while MLflow answers and things get sent."""
        started = last_change = last_tick = time.monotonic()
        sent = self._box.sent()
        while self._process.poll() is None and not is_done():
            time.sleep(_TICK_SECONDS)
            now = time.monotonic()
            passed, last_tick = now - last_tick, now
            if (now_sent := self._box.sent()) != sent:
                sent, last_change = now_sent, now
            if now - started > seconds or now - last_change > stalled_seconds:
                return
            contact = self.contact()
            if contact is None and is_server(self._store):
                self._start -= passed
            elif contact is not None and not contact.reached:
                self._patience -= passed
            if self._start < 0 or self._patience < 0:
                return

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it is gone; the outbox is kept
            if self._process.stdin is not None and not self._process.stdin.closed:
                self._process.stdin.write(word)
                self._process.stdin.flush()


class Parent:
    """The stage as its uploader sees it: what it says on the pipe, and whether it lives.

    Attributes:
        is_over: the stage has ended, in whatever way.
    """

    def __init__(self, producer: Producer, words: IO[bytes]) -> None:
        self.producer, self.is_over = producer, False
        self._words = words

    @property
    def is_dead(self) -> bool:
        """Whether the process has died; its children are then somebody else's."""
        return os.getppid() != self.producer.pid

    def wait(self, pause: float) -> None:
        """Wait for a word, or with a `pause` for its end whatever is said; at most while the stage lives."""
        until = time.monotonic() + pause if pause else float("inf")
        while not self.is_over and time.monotonic() < until:
            left = max(0.0, min(_LOOK_SECONDS, until - time.monotonic()))
            if self.is_dead:
                self.is_over = True
            elif select.select([self._words], [], [], left)[0]:
                said = os.read(self._words.fileno(), 65536)
                self.is_over = not said or said.endswith(_END)
                if not pause:
                    return

    def watch(self, outbox: Outbox) -> None:
        """Leave signs of life while the stage lives, and end this process soon after it has died."""
        last_sign = 0.0
        while not self.is_dead:
            if time.monotonic() - last_sign > _SIGN_OF_LIFE_SECONDS:
                last_sign = time.monotonic()
                outbox.producer_lives()
            time.sleep(_LOOK_SECONDS)
        time.sleep(GRACE_SECONDS)
        print("the stage has died and MLflow did not take everything in time", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may be waiting for a server that says nothing


def carry(outbox: Outbox, parent: Parent) -> bool:
    """Send the outbox again and again until the stage is over; pauses grow while MLflow does not answer.

    Returns:
        Whether everything was sent.
    """
    from vitpipe.track.delivery import Delivery, to_stderr

    notes: list[str] = []

    def say(line: str) -> None:
        notes.append(hidden(line))
        to_stderr(line)

    def answered() -> None:
        outbox.write_contact(Contact(reached=True, note="; ".join(notes)))

    delivery = Delivery(outbox, say=say, answered=answered)
    pause, is_sent = 0.0, False
    while True:
        parent.is_over = parent.is_over or parent.is_dead
        is_last = parent.is_over
        try:
            delivery.sync()
            if is_last:
                died_ms = int(time.time() * 1000) if parent.is_dead else 0
                delivery.mark_killed(ended=parent.producer, now_ms=died_ms)
            is_sent, pause = True, 0.0
            answered()
        except (TrackingError, StorageError) as error:
            is_sent, pause = False, min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            outbox.write_contact(Contact(reached=False, reason=error.what, fix=error.fix))
            to_stderr(str(error))
        if is_last:
            return is_sent
        parent.wait(pause)


class _WithoutCredentials(io.TextIOBase):
    """A stream that hides the credentials of addresses; whole lines, so that none is cut in two."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._begun = stream, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._stream.write(hidden(line) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def _environment(store: Address) -> dict[str, str]:
    """Our own environment; it names the store where ours names another one, or none with credentials."""
    root = str(Path(vitpipe.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    named = os.environ.get(URI)
    is_needed = store.secret != str(store) or (named and named != store.secret)
    return {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **({URI: store.secret} if is_needed else {})
    }  # fmt: skip


def main() -> None:
    """Carry one outbox, then those that other stages left behind beside it."""
    sys.stdout, sys.stderr = _WithoutCredentials(sys.stdout), _WithoutCredentials(sys.stderr)
    outbox = Outbox(Path(sys.argv[1]))
    parent = Parent(Producer.model_validate_json(sys.argv[2]), sys.stdin.buffer)
    threading.Thread(target=parent.watch, args=(outbox,), daemon=True).start()
    outbox.write_contact(Contact(reached=False, is_asking=True))
    with outbox.locked(wait=True):
        is_sent = carry(outbox, parent)
    if is_sent and not parent.is_dead:
        from vitpipe.track.sync import sync_beside

        try:
            sync_beside(outbox)
        except (TrackingError, StorageError) as error:
            print(error, file=sys.stderr)
    sys.exit(0 if is_sent else 1)


if __name__ == "__main__":
    main()
