"""All verdicts of a page in one table: a group per result, a line per run.

A line has our number once, beside the recorded results of a demo and beside the published row; facts for
which rows are not comparable are listed once, below the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitpipe.report.comparability import COSTS
from vitpipe.report.compare import Verdict
from vitpipe.report.protocol_ledger import LedgerRow
from vitpipe.report.reference import ReferenceComparison, ReferenceVerdict
from vitpipe.report.reference_table import reference_cells
from vitpipe.report.result_tables import in_unit, metric_label


@dataclass(frozen=True)
class VerdictLine:
    """One run's number.

    Attributes:
        runs: labels of the runs that have exactly this line.
        reference: mean, standard deviation, range and difference, as texts; None without recorded results.
        reference_verdict: None likewise.
        verdict: beside the published row; None where the recipe claims none.
    """

    runs: tuple[str, ...]
    ours: str
    reference: tuple[str, ...] | None
    reference_verdict: ReferenceVerdict | None
    verdict: Verdict | None

    def same(self, other: VerdictLine) -> bool:
        """Whether all that is shown is the same."""
        mine, theirs = (
            (line.ours, line.reference, line.reference_judgement, line.judgement, line.reason)
            for line in (self, other)
        )
        return mine == theirs

    @property
    def judgement(self) -> str:
        """Beside the published row, in words."""
        return self.verdict.judgement if self.verdict else ""

    @property
    def reason(self) -> str:
        """Of the published verdict."""
        return self.verdict.reason if self.verdict else ""

    @property
    def reference_judgement(self) -> str:
        """Beside the recorded results, in words."""
        return self.reference_verdict.judgement if self.reference_verdict else ""


@dataclass(frozen=True)
class VerdictGroup:
    """One result of the page: its name, the published row if there is one, and a line per run."""

    title: str
    published: Verdict | None
    lines: tuple[VerdictLine, ...]


@dataclass(frozen=True)
class VerdictTable:
    """The table and which of its columns are needed."""

    groups: tuple[VerdictGroup, ...]
    has_reference: bool
    has_published: bool
    has_difference: bool

    def sources(self) -> list[tuple[str, str]]:
        """(source, results) of the published rows, each source once."""
        found: dict[str, list[str]] = {}
        for group in self.groups:
            if group.published:
                found.setdefault(str(group.published.row["source"]), []).append(group.title)
        return [(source, ", ".join(titles)) for source, titles in found.items()]


Judged = tuple[str, Sequence[Verdict], ReferenceComparison | None]  # label, verdicts and comparison of a run


def verdict_table(runs: Sequence[Judged]) -> VerdictTable:
    """All results of all runs that are judged; what papers publish first, costs last."""
    found: dict[tuple[str, str, str], list[VerdictLine]] = {}
    published: dict[tuple[str, str, str], Verdict | None] = {}
    for label, verdicts, comparison in runs:
        recorded = comparison.verdicts if comparison and comparison.reference else ()
        by_metric = {(item.stage, item.metric): item for item in recorded}
        for verdict in verdicts:
            # A row has no id: it is identified by all of its values.
            key = (verdict.stage, verdict.metric, repr(sorted(verdict.row.items(), key=str)))
            published[key] = verdict
            item = by_metric.pop(key[:2], None)  # a second row of the same metric does not repeat it
            found.setdefault(key, []).append(_line(label, item, verdict))
        # The last stages have what a reader looks for.
        for item in reversed(by_metric.values()):
            key = (item.stage, item.metric, "")
            published[key] = None
            found.setdefault(key, []).append(_line(label, item, None))
    order = sorted(found, key=lambda key: (key[1] in COSTS, published[key] is None))
    groups = tuple(
        VerdictGroup(f"{key[0]} {metric_label(key[1])}", published[key], _merged(found[key])) for key in order
    )
    lines = [line for group in groups for line in group.lines]
    return VerdictTable(
        groups,
        has_reference=any(line.reference for line in lines),
        has_published=any(line.verdict for line in lines),
        has_difference=any(line.verdict and line.verdict.delta is not None for line in lines),
    )


def facts_by_rows(verdicts: Sequence[Verdict]) -> list[tuple[str, list[str]]]:
    """(`evaluate top-1, detect box AP`, facts for which these are not comparable), each fact once."""
    judged = [verdict for verdict in verdicts if verdict.judgement == "not comparable"]
    rows: dict[str, dict[str, None]] = {}  # an inner dict is an ordered set
    for verdict in judged:
        for fact in verdict.reason.split("; "):
            rows.setdefault(fact, {})[f"{verdict.stage} {metric_label(verdict.metric)}"] = None
    found: dict[tuple[str, ...], list[str]] = {}
    for fact, names in rows.items():
        found.setdefault(tuple(names), []).append(fact)
    every = tuple(dict.fromkeys(f"{v.stage} {metric_label(v.metric)}" for v in judged))
    ordered = sorted(found.items(), key=lambda item: -len(item[0]))
    return [
        ("all of them" if names == every and len(every) > 1 else ", ".join(names), facts)
        for names, facts in ordered
    ]


def _line(label: str, item: ReferenceVerdict | None, verdict: Verdict | None) -> VerdictLine:
    if item is not None:
        _, ours, mean, spread, extent, difference, _ = reference_cells(item)
        reference = (mean, spread, extent, difference) if item.row else None
        return VerdictLine((label,), ours, reference, item, verdict)
    assert verdict is not None
    return VerdictLine((label,), in_unit(verdict.ours, verdict.unit), None, None, verdict)


def _merged(lines: Sequence[VerdictLine]) -> tuple[VerdictLine, ...]:
    """Runs with the same line share it."""
    found: list[VerdictLine] = []
    for line in lines:
        for i, other in enumerate(found):
            if line.same(other):
                found[i] = VerdictLine(
                    (*other.runs, *line.runs),
                    other.ours,
                    other.reference,
                    other.reference_verdict,
                    other.verdict,
                )
                break
        else:
            found.append(line)
    return tuple(found)


def ledgers_of(runs: Sequence[Judged]) -> list[tuple[str, str, tuple[LedgerRow, ...]]]:
    """(results, labels, ledger): results and runs that were measured alike share a ledger.

    The labels are empty where all runs do.
    """
    found: dict[tuple[LedgerRow, ...], dict[str, dict[str, None]]] = {}
    for label, verdicts, _ in runs:
        for verdict in verdicts:
            name = f"{verdict.stage} {metric_label(verdict.metric)}"
            found.setdefault(verdict.ledger, {}).setdefault(name, {})[label] = None
    every = dict.fromkeys(label for label, *_ in runs)
    rows: dict[tuple[tuple[LedgerRow, ...], str], list[str]] = {}
    for ledger, names in found.items():
        for name, own in names.items():
            rows.setdefault((ledger, "" if own == every else ", ".join(own)), []).append(name)
    return [(", ".join(names), own, ledger) for (ledger, own), names in rows.items()]
