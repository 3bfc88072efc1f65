"""One stage of a table in a process of its own: `vitpipe run STAGE`, its output kept in a log file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import RunError, disk_errors
from vitpipe.contracts.processes import start_reading

# Ties the stage to this process, then becomes the stage: the kernel keeps the tie over exec. A stage that
# outlived a `kill -9` of the table would hold its folders' locks against the next attempt.
_TIED = (
    "import os, sys; from vitpipe.contracts.processes import die_with_parent; "
    "die_with_parent(int(sys.argv[1])); "
    "os.execv(sys.executable, [sys.executable, '-m', 'vitpipe', *sys.argv[2:]])"
)
_ERROR = "vitpipe: "
_NUM_LAST_LINES = 3


def stage_arguments(
    stage: str,
    recipe: str,
    profile: str,
    overrides: Sequence[str],
    inputs: Mapping[str, Path],
    out: Path,
) -> list[str]:
    """The arguments of `vitpipe` that run one stage of a recipe from folders to a folder."""
    return [
        *("run", stage, "--recipe", recipe, "--profile", profile),
        *(part for text in overrides for part in ("--set", text)),
        *(part for name, folder in inputs.items() for part in ("--in", f"{name}={folder}")),
        *("--out", str(out)),
    ]


def run_stage_process(arguments: Sequence[str], log: Path, say: Callable[[str], None]) -> None:
    """Run a stage and wait for its end.

    Args:
        arguments: as `stage_arguments`.
        log: file for everything that the stage prints.
        say: gets every line of it, too.

    Raises:
        RunError: the stage failed; what it said last is the message.
        KeyboardInterrupt: this process was interrupted; the stage has saved its state and ended.
    """
    with disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = log.open("w", encoding="utf-8", buffering=1)
    last: deque[str] = deque(maxlen=_NUM_LAST_LINES)
    process = start_reading([sys.executable, "-c", _TIED, str(os.getpid()), *arguments])
    assert process.stdout is not None  # stdout=PIPE
    with handle:
        try:
            for line in process.stdout:
                handle.write(line)
                say(line.rstrip("\n"))
                if line.strip():
                    last.append(line.strip())
            code = process.wait()
        except KeyboardInterrupt:
            handle.write(_stop(process))
            raise
    if code != 0:
        raise RunError(_reason(code, last), where=log, fix="correct the cause and run the same command again")


def _stop(process: subprocess.Popen[str]) -> str:
    """End a stage and return what it printed at last; a second interrupt does not wait for its state."""
    process.send_signal(signal.SIGTERM)
    try:
        # Its pipe is read to the end: a stage that blocks on a full one would never save.
        return process.communicate()[0]
    except KeyboardInterrupt:
        process.kill()
        process.wait()
        raise


def _reason(code: int, last: Sequence[str]) -> str:
    # The paragraph of a typed error is the last line; a defect's traceback ends with its message.
    if last and last[-1].startswith(_ERROR):
        return hidden(last[-1].removeprefix(_ERROR))
    ended = f"it ended with exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name
        ended = f"it was killed by {name}" + (", often for lack of memory" if name == "SIGKILL" else "")
    return hidden(f"{ended}; last output: {' | '.join(last)}" if last else ended)
