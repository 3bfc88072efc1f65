"""What the tests of the engines share: a compiled package, a stand-in for the command, doubles of the engines."""

from __future__ import annotations

import os
import sys
import types

import pytest
from engine_trials import PROFILE, RECIPE, ROOT, STAND_IN


@pytest.fixture(scope="session", autouse=True)
def _cheap_stacks():
    """Spare kfp the source lines of all its callers, of which it wants one name.

    It asks at every setting of a task, and Python then looks through all imported modules: a tenth of a second
    each in a process that has imported as much as these tests.
    """
    from kfp.dsl import pipeline_task

    def stack() -> list[tuple[None, None, None, str]]:
        frame = sys._getframe(1)
        return [(None, None, None, code.co_name) for code in (frame.f_code, frame.f_back.f_code)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_task, "inspect", types.SimpleNamespace(stack=stack))
        yield


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The demo's package, compiled once."""
    from pipelines.compile import compile_pipeline

    out = tmp_path_factory.mktemp("package") / "pipeline.yaml"
    return compile_pipeline(RECIPE, PROFILE, ["finetune.epochs=3", "seed=2"], out)


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    """A package of few stages, compiled once."""
    from pipelines.compile import compile_pipeline

    out = tmp_path_factory.mktemp("short") / "pipeline.yaml"
    stages = "stages=[prepare, pretrain, finetune, detect, report]"
    return compile_pipeline(RECIPE, PROFILE, [stages], out)


@pytest.fixture
def engine(monkeypatch, stand_in):
    """A Docker engine that runs processes; `vitpipe` is the stand-in."""
    import docker
    from docker_double import DockerDouble

    double = DockerDouble()
    monkeypatch.setattr(docker, "from_env", lambda: double)
    return double


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a fast `vitpipe` that keeps the contract first on the PATH."""
    command = tmp_path / "bin" / "vitpipe"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable, root=str(ROOT)), encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return command


@pytest.fixture
def kfp_api():
    """A double of the v2beta1 API on loopback."""
    from kfp_double import KfpDouble

    with KfpDouble() as double:
        yield double


@pytest.fixture
def real_engine():
    """The Docker engine of this machine with the plain image."""
    import docker

    from pipelines.local import DEV_IMAGE

    try:
        client = docker.from_env()
        client.ping()
        client.images.get(DEV_IMAGE)
    except docker.errors.ImageNotFound:
        pytest.skip(f"the Docker engine has no {DEV_IMAGE}: make it with docker/dev-image.sh")
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    yield client
    client.close()
