"""A stage on several nodes: its task launches a job with what the placement says of the stage."""

from __future__ import annotations

import pytest
import yaml

from pipelines.compile import compile_pipeline
from pipelines.local import run_locally
from pipelines.package import validate_package
from pipelines.placement import Placement
from vitpipe.cluster.settings import read_settings
from vitpipe.cluster.train_job import train_job
from vitpipe.contracts.errors import InputError

IMAGE = f"registry.example/train@sha256:{'0' * 64}"
PLACEMENT = Placement(
    pools={
        "gpu": {"node_selector": {"g": "a"}, "tolerations": ({"key": "gpu", "effect": "NoSchedule"},)},
        "cpu": {"node_selector": {"c": "b"}},
    },
    stages={"pretrain": {"nodes": 4, "timeout_hours": 100, "pool": "gpu"}},
    claims={
        "data": {"name": "sets", "path": "/data", "access_mode": "ReadOnlyMany"},
        "state": {"name": "kept", "path": "/state"},
    },
    tracking={"uri": "http://mlflow:5000", "secret": "login"},
    queue="a100",
    labels={"team": "vision"},
    environment={"NCCL_DEBUG": "WARN"},
    queueing_hours=10,
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("nodes") / "p.yaml"
    overrides = ["data.root=/data"]
    return compile_pipeline(
        "itpn/pixel_base", "full", overrides, out, images={"train": IMAGE}, placement=PLACEMENT
    )


def test_the_task_launches_a_job_with_the_stages_resources(package):
    task = next(task for task in package.tasks if task.stage == "pretrain")
    assert task.is_launched
    assert [other.stage for other in package.tasks if other.is_launched] == ["pretrain"]
    options = dict(zip(task.command[3::2], task.command[4::2], strict=True))
    assert options["--shared"] == "/state/shared"
    job = read_settings(options["--job"])
    assert (job.num_nodes, job.gpus_per_node, job.cpu, job.memory) == (4, 8, "88", "640Gi")
    assert job.active_deadline_seconds == 100 * 3600
    assert job.time_limit_seconds == 110 * 3600
    assert [(claim.path, claim.read_only) for claim in job.claims] == [("/data", True), ("/state", False)]
    assert {secret.variable for secret in job.secrets} == {
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    }
    assert job.environment == {"NCCL_DEBUG": "WARN", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    made = train_job("itpn-pretrain", job, ["vitpipe", "run", "pretrain"])
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "a100"
    assert made["spec"]["trainer"]["numNodes"] == 4


def test_its_own_pod_is_small_and_waits_long_enough(package):
    spec, platform = yaml.safe_load_all(package.path.read_text(encoding="utf-8"))
    container = spec["deploymentSpec"]["executors"]["exec-pretrain"]["container"]
    assert "accelerator" not in container["resources"]
    config = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-pretrain"]
    assert config["nodeSelector"]["labels"] == {"c": "b"}
    assert int(config["activeDeadlineSeconds"]) > 110 * 3600
    # Another stage has its GPUs itself.
    assert "accelerator" in spec["deploymentSpec"]["executors"]["exec-finetune"]["container"]["resources"]


def test_this_machine_is_one_node(package, tmp_path):
    assert validate_package(package.path).tasks == package.tasks
    with pytest.raises(InputError, match=r"several nodes \(pretrain\)"):
        run_locally(package.path, root=tmp_path)
    assert not list(tmp_path.iterdir())
