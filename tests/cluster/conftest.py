"""A Kubernetes API on the loopback, the real client that talks to it, and settings of a small job."""

from __future__ import annotations

import pytest
from kube_double import KubeDouble

from vitpipe.cluster import job_api, launcher, node_log
from vitpipe.cluster.job_api import JobApi
from vitpipe.cluster.settings import TrainJobSettings
from vitpipe.cluster.train_job import train_job


@pytest.fixture
def kube(tmp_path, monkeypatch):
    """The double, in KUBECONFIG; pauses are short."""
    double = KubeDouble()
    monkeypatch.setenv("KUBECONFIG", str(double.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(job_api, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(launcher, "_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(node_log, "_PAUSE_SECONDS", 0.05)
    yield double
    double.close()


@pytest.fixture
def settings():
    return TrainJobSettings(
        image="registry/vitpipe@sha256:00", num_nodes=2, gpus_per_node=8, cpu="88", memory="640Gi",
        claims=({"claim": "runs", "path": "/runs"},),
    )  # fmt: skip


@pytest.fixture
def job(settings):
    return train_job("pretrain-x", settings, ["vitpipe", "run", "pretrain"])


@pytest.fixture
def api(kube):
    return JobApi()
