"""The verdicts of one or many runs in one sentence, the first of page and terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vitpipe.report.compare import JUDGEMENTS, Judgement, Verdict
from vitpipe.report.reference import ReferenceComparison


def summary_of(verdicts: Sequence[Verdict], comparisons: Sequence[ReferenceComparison | None]) -> str:
    """`8 of 8 demo references reproduced; 5 of 5 published rows not comparable: other data.`"""
    # Without recorded results there is nothing to count; the note below the table says so.
    recorded = [
        item for found in comparisons if found is not None and found.reference for item in found.verdicts
    ]
    parts = [
        _counted("demo references", [item.judgement for item in recorded]),
        _counted("published rows", [item.judgement for item in verdicts]),
    ]
    kinds = dict.fromkeys(kind for verdict in verdicts for kind in verdict.kinds)
    if kinds:
        parts[-1] += f": {', '.join(kinds)}"
    said = "; ".join(part for part in parts if part)
    return f"{said}." if said else "This recipe has no published result to compare with."


def summaries_of(
    runs: Sequence[tuple[str, Sequence[Verdict], ReferenceComparison | None]],
) -> list[tuple[str, str]]:
    """(labels, sentence) of runs given as (label, verdicts, comparison); equal sentences once.

    The label of a single run is empty.
    """
    found: dict[str, list[str]] = {}
    for label, verdicts, comparison in runs:
        found.setdefault(summary_of(verdicts, [comparison]), []).append(label)
    return [(", ".join(own) if len(runs) > 1 else "", sentence) for sentence, own in found.items()]


def _counted(of: str, judgements: Sequence[Judgement]) -> str:
    counted = Counter(judgements)
    found = [(counted[name], name) for name in JUDGEMENTS if counted[name]]
    texts = [f"{number} {name}" for number, name in found[1:]]
    return ", ".join([f"{found[0][0]} of {len(judgements)} {of} {found[0][1]}", *texts]) if found else ""
