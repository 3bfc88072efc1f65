"""Pods as real containers: a file system and a host name of their own, one shared volume, and SIGKILL from outside."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from pod_double import Pod, written_three_minutes_ago
from safetensors.torch import load_file

from vitpipe.contracts.artifact import open_artifact
from vitpipe.stages.folder_lock import lock_of

ROOT = Path(__file__).parents[2]
SECONDS = 600

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def engine(tmp_path) -> Iterator[Any]:
    """The Docker engine of this machine with the plain image; what a failed test leaves there is removed."""
    import docker

    from pipelines.local import DEV_IMAGE

    try:
        client = docker.from_env()
        client.images.get(DEV_IMAGE)
    except docker.errors.ImageNotFound:
        pytest.skip(f"the Docker engine has no {DEV_IMAGE}: make it with docker/dev-image.sh")
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    yield client
    for container in client.containers.list(all=True, filters={"label": f"vitpipe.test={tmp_path}"}):
        container.remove(force=True)
    client.close()


def start(engine: Any, pod: Pod, volume: Path, inputs: dict[str, Path], label: Path) -> Any:
    """The command of a pod in a container that sees its own folder, its inputs and the volume only."""
    from docker.types import Mount

    from pipelines.local import DEV_IMAGE

    read_only = dict.fromkeys([ROOT, Path(sys.prefix), Path(sys.base_prefix), *inputs.values()])
    passed = {
        name: value
        for name, value in pod.environment.items()
        if name.startswith(("VITPIPE_", "MLFLOW_", "OMP_", "POD_"))
    }
    container = engine.containers.create(
        DEV_IMAGE, pod.command, detach=True, init=True, user=f"{os.getuid()}:{os.getgid()}",
        working_dir=str(pod.folder), environment=passed | {"HOME": str(pod.folder)}, shm_size="1g",
        labels={"vitpipe.test": str(label)}, network_mode="none",
        volumes={str(place): {"bind": str(place), "mode": "rw"} for place in (pod.folder, volume)},
        mounts=[Mount(str(path), str(path), type="bind", read_only=True) for path in read_only],
    )  # fmt: skip
    container.start()
    return container


def ended(container: Any) -> tuple[int, str]:
    """Exit code and log."""
    code = container.wait(timeout=SECONDS)["StatusCode"]
    return code, container.logs().decode()


def test_a_killed_container_goes_on_in_a_fresh_one(engine, tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    # Neither preparing nor the unbroken run needs a container to give what they give.
    prepared = Pod(tmp_path / "pod-0", volume, "prepare", {}, "8d3f").finish()
    (tmp_path / "other").mkdir()
    unbroken = Pod(tmp_path / "alone", tmp_path / "other", "pretrain", {"data": prepared}, "0000")
    unbroken.finish()

    inputs = {"data": prepared}
    first = Pod(tmp_path / "pod-1", volume, "pretrain", inputs, "8d3f")
    container = start(engine, first, volume, inputs, tmp_path)
    deadline = time.monotonic() + SECONDS
    while not list((volume / "states").glob("itpn.pixel_base.demo.pretrain-*/state-*.pt")):
        container.reload()
        assert container.status == "running", container.logs().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    container.kill(signal="SIGKILL")
    assert ended(container)[0] == 137
    assert not first.out.exists()
    (states,) = (volume / "states").glob("itpn.pixel_base.demo.pretrain-*/")
    written_three_minutes_ago(lock_of(states))

    second = Pod(tmp_path / "pod-2", volume, "pretrain", inputs, "8d3f")
    code, log = ended(start(engine, second, volume, inputs, tmp_path))
    assert code == 0, log
    assert "Resuming after step" in log
    weights, expected = (load_file(open_artifact(pod.out, "pretrain").weights) for pod in (second, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)

    client = mlflow.MlflowClient(f"sqlite:///{volume / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "vitpipe")
    runs = client.search_runs([experiment.experiment_id])
    (run,) = (run for run in runs if run.info.run_name.startswith("pretrain"))
    assert (run.info.status, run.data.tags["vitpipe.tries"]) == ("FINISHED", "2")
    assert run.data.tags["vitpipe.kubeflow_pod"] == "pod-2"
