"""Console output of a stage: a progress bar on a terminal, a plain line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from vitpipe.contracts.address import hidden
from vitpipe.contracts.shell import with_typed_commands
from vitpipe.contracts.units import format_duration

# Without a terminal the output goes into a log (pod, CI, `make demo > file`), which a line per step would
# flood.
SECONDS_BETWEEN_LINES = 15.0


class Console:
    """Progress and messages of one stage on stdout."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._bar: Any = None
        self._task: Any = None
        self._is_terminal = sys.stdout.isatty()
        self._started = self._last_line = time.monotonic()
        self._first_step: int | None = None

    def say(self, line: str) -> None:
        """Print a line, above a progress bar if one is shown, with credentials in addresses as `***`."""
        line = hidden(with_typed_commands(line))
        if self._bar is not None:
            # `[1/4]` in a message would be parsed as rich markup and disappear.
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def progress(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Show `step` of `num_steps` and the latest `values`."""
        if self._first_step is None:
            # A resumed run starts at a step > 0: estimate the remaining time from the steps of this process
            # only.
            self._first_step, self._started = step, time.monotonic()
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._is_terminal:
            self._draw(step, num_steps, numbers)
        elif step >= num_steps or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            seconds = self._seconds_left(step, num_steps)
            left = f"  {format_duration(round(seconds))} left" if seconds else ""
            # A stage may have 0 steps.
            share = f"{step / num_steps:.0%}" if num_steps else ""
            print(f"{self.stage}: step {step}/{num_steps} ({share})  {numbers}{left}", flush=True)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _seconds_left(self, step: int, num_steps: int) -> float | None:
        """None before a second step of this process: nothing is known of their pace."""
        done = step - (self._first_step or 0)
        if done <= 0 or step >= num_steps:
            return None
        return (time.monotonic() - self._started) / done * (num_steps - step)

    def _draw(self, step: int, num_steps: int, numbers: str) -> None:
        if self._bar is None:
            # rich is only needed on a terminal.
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self.stage, total=num_steps, completed=step, numbers="")
            self._bar.start()
        self._bar.update(self._task, completed=step, total=num_steps, numbers=numbers)
