"""The uploader: a process beside the stage that sends the stage's outbox to MLflow while it is being written.

Importing MLflow takes three seconds and a quarter of a gigabyte, and a server may be slow or unreachable.
None of that affects the training process, which only writes the journal and notifies the uploader by a pipe.

The run appears in MLflow with the stage's first committed numbers, or after `HOLD_SECONDS`: a stage that
refuses its input in the first seconds leaves no failed run behind.

At its end the stage writes "end" to the pipe: the uploader sends the rest and exits. A killed stage cannot
write it, and the pipe does not end either, because forked loader workers may survive and hold its other end
open. So the uploader also checks whether the stage is still its parent. After the stage's death it sends what
is final, marks the run KILLED, and exits after `GRACE_SECONDS` at the latest.
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
from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.outbox import Outbox, ServerStatus
from vitpipe.track.producer import Producer
from vitpipe.track.server import URI_VARIABLE, is_server

LOG = "uploader.log"
# After the stage's death. With a poll interval and the exit itself it stays below the 30 s that
# docs/safety.md states.
GRACE_SECONDS = 24.0
# In total over all waits of a stage, while the server does not answer: a little more than one probe
# (server.py).
NO_ANSWER_SECONDS = 6.0
LAST_TRY_SECONDS = 2.0  # at the end of the stage, even when NO_ANSWER_SECONDS are used up
START_SECONDS = 20.0  # for the uploader to start and import, on a busy machine
FINISH_SECONDS, STALLED_SECONDS = 120.0, 60.0  # while MLflow answers: in total, and without progress
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0  # between attempts while MLflow does not answer
# The heartbeat is a sixth of `STALE_SECONDS` (producer.py).
_POLL_SECONDS, _HEARTBEAT_SECONDS, _WAIT_STEP_SECONDS = 1.0, 30.0, 0.05
# Reading a recipe and opening a dataset takes less on any machine but a very busy one.
HOLD_SECONDS = 15.0
_WAKE, _BEGIN, _END = b"wake\n", b"begin\n", b"end\n"


class Uploader:
    """The stage's handle on its uploader process. The stage continues when that process dies.

    Args:
        address: tracking URI with credentials, which the process is given in its environment.
    """

    def __init__(self, outbox: Outbox, address: Address) -> None:
        outbox.write_server_status(None)
        producer = Producer.of_this_process().model_dump_json()
        with (outbox.folder / LOG).open("ab") as log:
            # A session of its own, so that Ctrl-C in the terminal reaches the stage only, and the rest is
            # still sent.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vitpipe.track.uploader", str(outbox.folder.resolve()), producer],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env=_environment(address),
            )  # fmt: skip
        self._outbox, self._address = outbox, address
        self._no_answer_left, self._start_left = NO_ANSWER_SECONDS, START_SECONDS

    def wake(self) -> None:
        """Notify the uploader of new records."""
        self._write(_WAKE)

    def begin(self) -> None:
        """Let the run appear in MLflow: the stage has something to show."""
        self._write(_BEGIN)

    def withdraw(self) -> bool:
        """Stop an uploader that has not begun.

        Returns:
            Whether nothing of this process has reached MLflow.
        """
        if self.server_status() is not None:
            return False  # it has begun to ask
        self._process.kill()
        self._process.wait()
        return self.server_status() is None

    def server_status(self) -> ServerStatus | None:
        """Whether MLflow answers this uploader; None before its first attempt."""
        # The uploader of an earlier process of this stage may still write into the same outbox.
        status = self._outbox.server_status()
        return status if status is not None and status.pid == self._process.pid else None

    def wait_for_run(self, seconds: float) -> None:
        """Wait until the MLflow run has an ID, `seconds` at most; less when MLflow does not answer."""

        def is_known() -> bool:
            status = self.server_status()
            return bool(self._outbox.run_id) or (status is not None and bool(status.reason))

        self._wait(is_known, seconds, seconds)

    def finish(self) -> None:
        """Let the uploader send the rest and exit; kill it when MLflow does not answer or nothing is sent."""
        self._write(_END)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._no_answer_left = max(self._no_answer_left, LAST_TRY_SECONDS)
        self._wait(lambda: False, FINISH_SECONDS, STALLED_SECONDS)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _wait(self, is_done: Callable[[], bool], seconds: float, stalled_seconds: float) -> None:
        """Wait for `is_done` or the uploader's exit, `seconds` at most, `stalled_seconds` if idle."""
        started = last_change = last_step = time.monotonic()
        sent = self._outbox.sent()
        while self._process.poll() is None and not is_done():
            time.sleep(_WAIT_STEP_SECONDS)
            now = time.monotonic()
            passed, last_step = now - last_step, now
            if (now_sent := self._outbox.sent()) != sent:
                sent, last_change = now_sent, now
            if now - started > seconds or now - last_change > stalled_seconds:
                return
            # The budgets are shared by all waits of the stage: an unreachable server costs them once, not at
            # every call. A database file answers as soon as the uploader runs, so its start is always worth
            # waiting for.
            status = self.server_status()
            if status is None and is_server(self._address):
                self._start_left -= passed
            elif status is not None and not status.reached:
                self._no_answer_left -= passed
            if self._start_left < 0 or self._no_answer_left < 0:
                return

    def _write(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the uploader has exited; the outbox is kept
            if self._process.stdin is not None and not self._process.stdin.closed:
                self._process.stdin.write(message)
                self._process.stdin.flush()


class StageProcess:
    """The stage as seen by its uploader: its messages on the pipe, and whether its process is alive.

    Attributes:
        has_begun: its run may appear in MLflow.
        has_ended: the stage has finished or was killed.
    """

    def __init__(self, producer: Producer, pipe: IO[bytes]) -> None:
        self.producer, self.has_begun, self.has_ended = producer, False, False
        self._pipe = pipe

    def hold(self, seconds: float) -> None:
        """Wait until the run may appear: the stage says so or ends, or `seconds` have passed."""
        until = time.monotonic() + seconds
        while not self.has_begun and not self.has_ended and (left := until - time.monotonic()) > 0:
            self.wait(left)

    @property
    def is_dead(self) -> bool:
        """Whether the process is dead."""
        # The kernel gives the children of a dead process to another parent. Unlike a PID, this cannot be
        # reused.
        return os.getppid() != self.producer.pid

    def wait(self, pause: float) -> None:
        """Wait for the next message, or `pause` seconds if that is not 0; return when the stage has ended."""
        until, had_begun = time.monotonic() + pause if pause else float("inf"), self.has_begun
        while not self.has_ended and time.monotonic() < until:
            left = max(0.0, min(_POLL_SECONDS, until - time.monotonic()))
            if self.is_dead:
                self.has_ended = True
            elif select.select([self._pipe], [], [], left)[0]:
                # All that is in the pipe at once: many commits are one reason to send.
                received = os.read(self._pipe.fileno(), 65536)
                self.has_begun = self.has_begun or _BEGIN in received
                self.has_ended = not received or received.endswith(_END)
                if self.has_begun and not had_begun:
                    return
                # A stage commits often; without an answer from MLflow it must not be asked at every commit.
                if not pause:
                    return

    def watch(self, outbox: Outbox) -> None:
        """Renew the heartbeat while the stage is alive; end this process `GRACE_SECONDS` after its death."""
        last_heartbeat = 0.0
        while not self.is_dead:
            if time.monotonic() - last_heartbeat > _HEARTBEAT_SECONDS:
                last_heartbeat = time.monotonic()
                outbox.touch_producer()
            time.sleep(_POLL_SECONDS)
        time.sleep(GRACE_SECONDS)
        print("the stage was killed and MLflow did not take everything in time", file=sys.stderr, flush=True)
        # `sys.exit` in a thread ends the thread only, and the main thread may hang in a request.
        os._exit(1)


def upload(outbox: Outbox, stage: StageProcess) -> bool:
    """Send the outbox repeatedly until the stage has ended; pauses grow while MLflow does not answer.

    Returns:
        Whether everything was sent.
    """
    # Imported here because these modules are only needed in the uploader's own process.
    from vitpipe.track.delivery import Delivery, print_to_stderr
    from vitpipe.track.system_metrics import SystemMetrics

    notes: list[str] = []

    def warn(line: str) -> None:
        notes.append(hidden(line))
        print_to_stderr(line)

    def report_answer() -> None:
        outbox.write_server_status(ServerStatus(reached=True, note="; ".join(notes)))

    delivery = Delivery(outbox, warn=warn, on_answer=report_answer)
    machine = SystemMetrics(delivery.address)
    pause, is_sent = 0.0, False
    while True:
        stage.has_ended = stage.has_ended or stage.is_dead
        # Read before sending: records that a stage writes before its end are then sent by this round.
        is_last = stage.has_ended
        try:
            delivery.sync()
            if is_last:
                died_ms = int(time.time() * 1000) if stage.is_dead else 0
                # Without effect after a final status in the journal.
                delivery.mark_killed(ended=stage.producer, now_ms=died_ms)
            is_sent, pause = True, 0.0
            report_answer()
            if not is_last:
                machine.begin(delivery.sent.run_id)
        except (TrackingError, StorageError) as error:
            is_sent, pause = False, min(max(2 * pause, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            outbox.write_server_status(ServerStatus(reached=False, reason=error.what, fix=error.fix))
            print_to_stderr(str(error))
        if is_last:
            if is_sent:
                machine.end()
            return is_sent
        stage.wait(pause)


class _RedactingStream(io.TextIOBase):
    """A stream that replaces the credentials of addresses by `***`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._begun = stream, ""

    def write(self, text: str) -> int:
        # Only whole lines: an address may arrive in two calls, and neither half would be recognised.
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._stream.write(hidden(line) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def _environment(address: Address) -> dict[str, str]:
    """This process's environment, with the tracking URI where it adds credentials or another address."""
    # `python -m vitpipe...` must import the package of this process, also when it is not installed.
    root = str(Path(vitpipe.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    named = os.environ.get(URI_VARIABLE)
    # By the environment and not as an argument: `ps` shows arguments to every user of the machine.
    is_needed = address.secret != str(address) or (named and named != address.secret)
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        **({URI_VARIABLE: address.secret} if is_needed else {}),
    }


def main() -> None:
    """Send one outbox until its stage has ended, then the pending outboxes of other stages beside it."""
    # MLflow and the libraries below it print addresses as they were given, with passwords.
    sys.stdout, sys.stderr = _RedactingStream(sys.stdout), _RedactingStream(sys.stderr)
    outbox = Outbox(Path(sys.argv[1]))
    stage = StageProcess(Producer.model_validate_json(sys.argv[2]), sys.stdin.buffer)
    threading.Thread(target=stage.watch, args=(outbox,), daemon=True).start()
    # Meanwhile: the longest part of the start.
    import mlflow.tracking  # noqa: F401

    stage.hold(HOLD_SECONDS)
    # The uploader of an earlier process of this stage may still be sending; it releases the lock when it
    # exits.
    with outbox.locked(wait=True):
        # Only now: from here on the stage counts the time in which MLflow does not answer.
        outbox.write_server_status(ServerStatus(reached=False, is_asking=True))
        is_sent = upload(outbox, stage)
    # Not after the stage's death: the watching thread may end this process at any moment.
    if is_sent and not stage.is_dead:
        from vitpipe.track.sync import sync_beside

        try:
            sync_beside(outbox)
        except (TrackingError, StorageError) as error:
            print(error, file=sys.stderr)
    sys.exit(0 if is_sent else 1)


if __name__ == "__main__":
    main()
