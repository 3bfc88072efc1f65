"""Curves of the machine in MLflow, from the uploader's process; on by default, and never in the stage's way."""

from __future__ import annotations

import time

import pytest

from vitpipe.contracts.address import Address
from vitpipe.track.stage_run import stage_run
from vitpipe.track.system_metrics import SWITCH, SystemMetrics

pytestmark = pytest.mark.slow
CPU = "system/cpu_utilization_percentage"


def run_a_stage(recipe, tmp_path, client, seconds: float):
    """A stage that lives until MLflow has the machine's load, `seconds` at most; its metrics in MLflow."""
    (tmp_path / "out").mkdir()
    with stage_run(
        stage="pretrain", recipe=recipe, folder=tmp_path / "out", state=tmp_path / ".out.state"
    ) as run:
        run.metrics({"train/loss": 1.0}, 1)
        run.commit(1)
        until, run_id = time.monotonic() + seconds, run.run_id
        while time.monotonic() < until and CPU not in client.get_run(run_id).data.metrics:
            time.sleep(0.2)
    return client.get_run(run_id)


def test_a_stage_has_them_unless_they_are_switched_off(recipe, tmp_path, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    found = run_a_stage(recipe, tmp_path, client, 60)
    assert found.info.status == "FINISHED"
    assert 0 <= found.data.metrics[CPU] <= 100
    assert found.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert found.data.metrics["train/loss"] == 1.0

    monkeypatch.setenv(SWITCH, "false")
    other = tmp_path / "off"
    other.mkdir()
    found = run_a_stage(recipe, other, client, 3)
    assert set(found.data.metrics) == {"train/loss"}


def test_a_machine_that_cannot_be_measured_costs_these_curves_only(store, monkeypatch):
    from mlflow.system_metrics import system_metrics_monitor

    def refuses(*args, **kwargs):
        raise RuntimeError("no such counter")

    monkeypatch.setattr(system_metrics_monitor, "SystemMetricsMonitor", refuses)
    machine = SystemMetrics(Address(store))
    machine.begin("abc")
    machine.begin("abc")
    machine.end()
