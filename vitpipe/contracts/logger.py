"""How training and evaluation report; `vitpipe.track` implements it, tests use `MemoryLogger`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class RunLogger(Protocol):
    """The only way in which training and evaluation code reports. Rank 0 only.

    Points become visible to the tracker at `commit`, never before: a point whose step no saved
    training state covers could be taken back by a resume and would then be logged twice.
    """

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at an optimiser step (flat names, for example `train/loss`)."""

    def commit(self, step: int) -> None:
        """Everything up to `step` is final (the training state has been saved, or the stage is done)."""

    def rewind(self, step: int) -> None:
        """A run resumes after `step`: forget uncommitted points with a larger step."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table (also written to `tables/NAME.csv` of the stage's folder)."""

    def figure(self, name: str, path: Path) -> None:
        """Record a picture file."""

    def dataset(self, name: str, digest: str, source: str, context: str, facts: Mapping[str, Any]) -> None:
        """Record a dataset that this run reads.

        Args:
            name: one per dataset and split; the same again is recorded once.
            digest: of its content.
            source: where it lies: a path, s3://..., https://...
            context: what it is used for: `training`, `validation`, `testing`.
            facts: flat values, for example `num_images`, `num_classes`, `dvc_md5`.
        """

    def say(self, line: str) -> None:
        """One line for the person at the terminal or in the pod's log."""

    def progress(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Show how far the run is: a bar on a terminal, a plain line now and then in a log."""


class MemoryLogger:
    """A logger that keeps everything in lists, for tests and for use as a library."""

    def __init__(self) -> None:
        self.points: list[tuple[int, str, float]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.figures: dict[str, Path] = {}
        self.datasets: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.committed_step = -1

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append one point per name."""
        self.points.extend((step, name, float(value)) for name, value in values.items())

    def commit(self, step: int) -> None:
        """Remember the step."""
        self.committed_step = step

    def rewind(self, step: int) -> None:
        """Drop points after `step`."""
        self.points = [point for point in self.points if point[0] <= step]

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the rows."""
        self.tables[name] = [dict(row) for row in rows]

    def figure(self, name: str, path: Path) -> None:
        """Keep the path."""
        self.figures[name] = path

    def dataset(self, name: str, digest: str, source: str, context: str, facts: Mapping[str, Any]) -> None:
        """Keep the arguments."""
        self.datasets.append(
            {"name": name, "digest": digest, "source": source, "context": context, "facts": dict(facts)}
        )

    def say(self, line: str) -> None:
        """Keep the line."""
        self.lines.append(line)

    def progress(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Show nothing."""
