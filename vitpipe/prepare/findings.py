"""Findings of `vitpipe doctor`: each says what is wrong, where, and how to fix it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import VitpipeError

# The order is the order of columns in `DatasetReport.table`.
Level = Literal["error", "warning", "note"]
COUNTS = ("train", "val", "classes", "errors", "warnings", "notes")
"""Numeric columns of `DatasetReport.table`; right-aligned when printed."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        level: `error` stops a run or makes its result wrong, `warning` makes results differ from published
            ones, `note` is for information.
        what: what is wrong, one sentence without a full stop.
        where: the file or folder.
        fix: an imperative; empty if there is nothing to do.
    """

    level: Level
    what: str
    where: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        # Addresses come with the credentials that the user gave; JSON shows these texts as they are.
        for name in ("what", "where", "fix"):
            object.__setattr__(self, name, hidden(getattr(self, name)))

    @classmethod
    def of(cls, error: VitpipeError) -> Finding:
        """The finding for an exception that would stop a run."""
        return cls("error", error.what, error.where, error.fix)

    def __str__(self) -> str:
        """One paragraph: what, where, fix."""
        return f"{self.level}: {VitpipeError(self.what, where=self.where, fix=self.fix)}"


@dataclass
class DatasetReport:
    """The findings about one dataset.

    Attributes:
        form: storage format, for example `class folders`; empty if it was not recognised.
        num_train, num_val: number of images; None if they could not be counted.
        num_classes: None if unknown; 0 for a set without classes.
    """

    dataset: str
    form: str = ""
    num_train: int | None = None
    num_val: int | None = None
    num_classes: int | None = None
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: Level, what: str, where: object = "", fix: str = "") -> None:
        """Add one finding."""
        self.findings.append(Finding(level, what, str(where), fix))

    def table(self) -> dict[str, Any]:
        """One row of text for a terminal table: counts only."""
        counts = Counter(finding.level for finding in self.findings)
        return {
            "set": self.dataset,
            "form": self.form or "not usable",
            "train": _counted(self.num_train),
            "val": _counted(self.num_val),
            "classes": _counted(self.num_classes),
            **{f"{level}s": counts[level] for level in get_args(Level)},
        }


def _counted(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"
