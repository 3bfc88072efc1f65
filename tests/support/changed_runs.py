"""Finished runs with something changed in memory, for reports on them."""

from __future__ import annotations

import dataclasses
from typing import Any

from vitpipe.contracts.artifact import Artifact
from vitpipe.report.results import RunResults


def with_stage(
    run: RunResults,
    stage: str,
    *,
    metrics: dict[str, float] | None = None,
    card: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
) -> RunResults:
    """A run whose stage has other metrics, values of its card, or values of its record."""
    made = run.artifacts[stage]
    changed = Artifact(
        made.path,
        made.card.model_copy(update=card or {}),
        {**made.metrics, **(metrics or {})},
        made.run.model_copy(update=record or {}),
    )
    return dataclasses.replace(run, artifacts={**run.artifacts, stage: changed})
