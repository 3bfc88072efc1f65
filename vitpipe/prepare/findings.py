"""What an examination finds: each finding says what, where and how to fix it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vitpipe.contracts.errors import VitpipeError

Level = Literal["error", "warning", "note"]
COUNTS = ("train", "val", "classes", "errors", "warnings", "notes")
"""Columns of `DatasetReport.table` that are numbers."""


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        level: `error` stops a run or spoils its result, `warning` makes results differ from published ones,
            `note` is for information.
    """

    level: Level
    what: str
    where: str = ""
    fix: str = ""

    @classmethod
    def of(cls, error: VitpipeError) -> Finding:
        """An error that would have stopped a run."""
        return cls("error", error.what, error.where, error.fix)

    def __str__(self) -> str:
        """As one paragraph."""
        # The same wording as errors have: where, then the fix.
        return f"{self.level}: {VitpipeError(self.what, where=self.where, fix=self.fix)}"


@dataclass
class DatasetReport:
    """What was found out about one dataset.

    Attributes:
        form: in which form it lies there; empty when that is not known.
        num_train, num_val: images; None when they could not be counted.
        num_classes: None when not known; 0 for a set without classes.
    """

    dataset: str
    form: str = ""
    num_train: int | None = None
    num_val: int | None = None
    num_classes: int | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        """Findings that stop a run."""
        return sum(finding.level == "error" for finding in self.findings)

    def add(self, level: Level, what: str, where: object = "", fix: str = "") -> None:
        """Add one finding."""
        self.findings.append(Finding(level, what, str(where), fix))

    def table(self) -> dict[str, Any]:
        """One row for people, without the findings themselves."""
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
