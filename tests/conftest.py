"""What every test shares: no network, no telemetry, nothing written into the checkout, fixed seeds."""

from __future__ import annotations

import os
import random
import signal

# Before any library reads them. A GPU is hidden: what is tested bit for bit holds for a CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true",
    DVC_NO_ANALYTICS="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    VITPIPE_TRACKING="off",  # a uploader per stage costs seconds; the tests of tracking switch it on
)
# A shell starts what it leaves in the background with Ctrl-C ignored, and all processes below inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)

import pytest  # noqa: E402  (after the environment is set)
from hypothesis import settings  # noqa: E402

pytest_plugins = ["embedded_sets"]  # tiny raw and prepared sets, for every folder of tests

settings.register_profile("house", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _own_tracking_store(tmp_path, monkeypatch):
    """No test may write into the checkout's MLflow store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    random.seed(0)
