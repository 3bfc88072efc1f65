"""Summary of all stages in the pipeline's own MLflow run, so that two pipeline runs can be compared."""

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
    references: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, Path] | None = None,
    cards: Mapping[str, str] | None = None,
    note: str = "",
) -> None:
    """Log final metrics of every stage, the verdict tables and the report to the pipeline's run.

    Metrics are named `stage/metric`. The tag `vitpipe.run.STAGE` is the ID of the MLflow run that produced
    them; `vitpipe.cached` lists the stages whose outputs come from an earlier pipeline run. The records are
    kept and sent later when MLflow does not answer. Does nothing for a logger that is not a `StageRun`.

    Args:
        artifacts: stage -> finished output folder.
        verdicts, references: rows beside the published ones, and beside recorded results of ours.
        files: name in MLflow -> file, for example `report.html`.
        cards: MLflow run of a stage -> card of its registered model.
        note: Markdown that MLflow shows as the run's description.
    """
    if not isinstance(logger, StageRun):
        return
    # The metrics of `prepare` are counts of images; in MLflow's plots they would dwarf accuracies below 1.
    results = {stage: artifact for stage, artifact in artifacts.items() if stage != "prepare"}
    metrics = {
        f"{stage}/{name}": v for stage, artifact in results.items() for name, v in artifact.metrics.items()
    }
    metrics |= {
        f"{stage}/wall_seconds": a.run.wall_seconds for stage, a in artifacts.items() if a.run.wall_seconds
    }
    tags = {f"vitpipe.run.{stage}": artifact.run.tracking_run for stage, artifact in artifacts.items()}
    if note:
        tags["mlflow.note.content"] = note
    for name, rows in (("verdict", verdicts), ("reference", references)):
        if rows:
            logger.log_file(f"tables/{name}.json", table_as_json([dict(row) for row in rows]), "pipeline")
    for name, path in (files or {}).items():
        logger.log_file(name, path, target="pipeline")
    # `tracking_run` is empty for a stage whose run was not in MLflow when it ended.
    known = {key: value for key, value in tags.items() if value}
    logger.journal.summary(metrics, known, cards or {})
