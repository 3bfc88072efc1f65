"""Load, memory, disk, network and GPUs of the stage's machine as `system/*`, by MLflow's own monitor.

Sampled every ten seconds by the uploader, so that the training process does no work for it. They tell how
the machine was used and are no results: points that a slow server does not take are lost.
`MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false` switches them off, `MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL` (in
seconds) changes the interval.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from vitpipe.contracts.address import Address

SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"


class SystemMetrics:
    """Begins with the first known run; `end` is called when the run has its final status."""

    def __init__(self, address: Address) -> None:
        self._address, self._monitor = address, None
        self._is_on = os.environ.get(SWITCH, "true").lower() not in ("false", "0")

    def begin(self, run_id: str) -> None:
        """Start the monitor's thread, once."""
        if not self._is_on or self._monitor is not None or not run_id:
            return
        self._is_on = False  # one attempt: without it a machine that refuses would be asked at every commit
        # Whatever goes wrong here, a missing library of a GPU's maker for example, costs these curves only.
        with contextlib.suppress(Exception):
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor: Any = SystemMetricsMonitor(
                run_id, resume_logging=True, tracking_uri=self._address.secret
            )
            monitor.start()
            self._monitor = monitor

    def end(self) -> None:
        """Stop the thread."""
        if self._monitor is not None:
            with contextlib.suppress(Exception):
                self._monitor.finish()
