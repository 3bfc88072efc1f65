"""A finished published table as one MLflow run: its rows, our means and spreads, and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitpipe.config.digest import digest_of
from vitpipe.contracts.address import hidden
from vitpipe.track.mlflow_errors import tracking_errors
from vitpipe.track.mlflow_names import MAX_TAG_LENGTH, PREFIX, metric_name
from vitpipe.track.outbox import table_as_json
from vitpipe.track.server import EXPERIMENT, OFF, connect, experiment_id, store_address

_TABLE, _DIGEST = f"{PREFIX}table", f"{PREFIX}table_digest"
_BATCH = 1000  # MAX_METRICS_PER_BATCH of mlflow/utils/validation.py (3.17)


def log_table(
    name: str,
    params: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    files: Mapping[str, Path],
    note: str,
) -> str:
    """Log a table to its own MLflow run, which later calls update; nothing is logged twice.

    Metrics are `RECIPE/STAGE/VARIANT/DATASET/METRIC/mean`, `.../sd` and `.../published`. The table's files
    are written already, so an MLflow that does not answer costs nothing: the same command logs them later.

    Args:
        name: the run's name as MLflow shows it.
        params: of the table and its size; by them the run is found again.
        rows: as `seed_results.plain_rows`.
        files: name in MLflow -> file.
        note: Markdown that MLflow shows as the run's description.

    Returns:
        The run's ID; empty when tracking is off.

    Raises:
        TrackingError: MLflow does not answer or refuses.
    """
    address = store_address(Path.cwd())
    if address == OFF:
        return ""
    client = connect(address)
    with tracking_errors(address):
        run = _run_of(client, experiment_id(client, address, EXPERIMENT), name, params)
        digest = digest_of([dict(row) for row in rows])
        if run.data.tags.get(_DIGEST) == digest:
            return str(run.info.run_id)
        run_id = str(run.info.run_id)
        for start in range(0, len(metrics := _metrics(rows)), _BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
        client.log_text(run_id, table_as_json([dict(row) for row in rows]), "tables/table.json")
        for path in files.values():
            client.log_artifact(run_id, str(path))
        client.set_tag(run_id, "mlflow.note.content", hidden(note)[:MAX_TAG_LENGTH])
        # Last: after a failure in between, the next call logs all of it again.
        client.set_tag(run_id, _DIGEST, digest)
        client.set_terminated(run_id, "FINISHED")
        return run_id


def _run_of(client: Any, experiment: str, name: str, params: Mapping[str, str]) -> Any:
    """The run of this table, which is created if it does not exist."""
    key = digest_of(dict(params))
    found = client.search_runs([experiment], filter_string=f"tags.`{_TABLE}` = '{key}'", max_results=1)
    if found:
        return found[0]
    tags = {
        _TABLE: key,
        f"{PREFIX}role": "table",
        "mlflow.source.name": "vitpipe",
        "mlflow.source.type": "LOCAL",
    }
    run = client.create_run(experiment, tags=tags, run_name=name)
    for param, value in params.items():
        client.log_param(run.info.run_id, metric_name(param), hidden(value))
    return run


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    now, found = get_current_time_millis(), dict[str, float]()
    for row in rows:
        # Two rows of a recipe may compare the same metric, in two settings: the published values differ then.
        place = f"{row['recipe']}/{row['stage']}/{row['variant']}/{row['dataset']}/{row['metric']}"
        values = {"mean": row["ours_mean"], "sd": row["ours_sd"], "published": row["published"]}
        found |= {
            metric_name(f"{place}/{kind}"): float(value)
            for kind, value in values.items()
            if row["ours_mean"] != "" and isinstance(value, int | float)
        }
    return [Metric(key, value, now, 0) for key, value in found.items()]
