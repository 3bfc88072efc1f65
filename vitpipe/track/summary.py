"""The pipeline's own run: all stages' numbers in one place, so that two pipelines compare at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.logger import RunLogger
from vitpipe.track.outbox import table_as_json
from vitpipe.track.stage_run import StageRun


def log_pipeline_summary(
    logger: RunLogger,
    artifacts: Mapping[str, Artifact],
    *,
    verdicts: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, Path] | None = None,
    note: str = "",
) -> None:
    """Hand the pipeline's run every stage's final numbers, the verdict table and the report.

    Metrics are named `stage/metric` (counts of the data excepted: they would be in the way of every plot);
    the tag `vitpipe.run.STAGE` names the MLflow run that made them,
    `vitpipe.cached` the stages that this pipeline run took from an earlier one. Kept and sent later
    when MLflow does not answer. Does nothing for a logger that is not a `StageRun`.

    Args:
        artifacts: stage -> finished folder.
        files: name in MLflow -> file, for example `report.html`.
        note: Markdown that MLflow shows as the run's description.
    """
    if not isinstance(logger, StageRun):
        return
    results = {stage: artifact for stage, artifact in artifacts.items() if stage != "prepare"}
    metrics = {
        f"{stage}/{name}": v for stage, artifact in results.items() for name, v in artifact.metrics.items()
    }
    metrics |= {f"{stage}/wall_seconds": artifact.card.wall_seconds for stage, artifact in artifacts.items()}
    tags = {f"vitpipe.run.{stage}": artifact.card.tracking_run for stage, artifact in artifacts.items()}
    if note:
        tags["mlflow.note.content"] = note
    if verdicts:
        logger.hand_over("tables/verdict.json", table_as_json([dict(row) for row in verdicts]), "pipeline")
    for name, path in (files or {}).items():
        logger.hand_over(name, path, target="pipeline")
    logger.journal.summary(metrics, {key: value for key, value in tags.items() if value})
