"""A table is one MLflow run: found again, updated when its numbers change, nothing logged twice."""

from __future__ import annotations

import pytest

from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.table_run import log_table

ROW = {
    "variant": "plain", "dataset": "digits", "metric": "top1", "published": 60.0, "ours_mean": 60.5,
    "ours_sd": 0.7, "recipe": "toy/cells/plain", "stage": "finetune",
}  # fmt: skip
PARAMS = {"table": "toy/1", "profile": "size", "seeds": "2"}
KEY = "toy/cells/plain/finetune/plain/digits/top1"


def log(tmp_path, *rows, params=PARAMS) -> str:
    page = tmp_path / "table.html"
    page.write_text("<p>page")
    return log_table("table toy/1", params, rows, {"table.html": page}, "| a table |")


def test_a_table_is_one_run_with_rows_metrics_and_files(client, tmp_path):
    run = client.get_run(log(tmp_path, ROW, {**ROW, "recipe": "", "ours_mean": "", "ours_sd": ""}))
    assert run.data.metrics == {f"{KEY}/mean": 60.5, f"{KEY}/sd": 0.7, f"{KEY}/published": 60.0}
    assert run.data.params == PARAMS
    assert run.data.tags["mlflow.note.content"] == "| a table |"
    assert run.info.status == "FINISHED"
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names == {"table.html", "tables"}


def test_the_same_table_is_not_logged_again_and_another_one_has_its_own_run(client, tmp_path):
    first = log(tmp_path, ROW)
    assert log(tmp_path, ROW) == first
    assert len(client.get_metric_history(first, f"{KEY}/mean")) == 1
    assert log(tmp_path, {**ROW, "ours_mean": 60.6}) == first
    assert [point.value for point in client.get_metric_history(first, f"{KEY}/mean")] == [60.5, 60.6]
    assert log(tmp_path, ROW, params={**PARAMS, "seeds": "3"}) != first


def test_a_server_that_does_not_answer_is_an_error_for_the_caller(client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError):
        log(tmp_path, ROW)


def test_nothing_happens_with_tracking_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITPIPE_TRACKING", "off")
    assert log(tmp_path, ROW) == ""
    assert not list(tmp_path.glob("mlflow.db*"))
