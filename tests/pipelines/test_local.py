"""The local run: the whole package through kfp's runner, truthful about every way to fail."""

from __future__ import annotations

import json

import docker
import pytest
from docker_double import DockerDouble

from pipelines.compile import compile_pipeline
from pipelines.local import DEV_IMAGE, Containers, run_locally
from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.errors import EngineError, InputError
from vitpipe.contracts.graph import all_stages

pytestmark = pytest.mark.slow


@pytest.fixture
def engine(monkeypatch, stand_in):
    """A Docker engine that runs processes; `vitpipe` is the stand-in."""
    double = DockerDouble()
    monkeypatch.setattr(docker, "from_env", lambda: double)
    return double


def test_every_stage_runs_by_its_compiled_command(package, engine, tmp_path):
    run = run_locally(package.path, root=tmp_path / "runs", shm_gib=3)
    assert list(run.outputs) == list(package.stages)
    assert len(engine.started) == len(package.stages)
    for task in package.tasks:
        folder = run.outputs[task.stage]
        artifact = open_artifact(folder, task.stage)
        assert artifact.card.recipe == "itpn/pixel_base"
        assert artifact.metrics["num_inputs"] == len(task.inputs)
        own = {"finetune": 2, "evaluate": 2, "report": 2}
        assert artifact.metrics["num_overrides"] == own.get(task.stage, 1)
        output = json.loads((folder.parent / "executor_output.json").read_text(encoding="utf-8"))
        metadata = output["artifacts"]["out"]["artifacts"][0]["metadata"]
        assert metadata["code_digest"] == artifact.card.code_digest
        assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"] == artifact.metrics
        assert f"working on {task.stage}" in (run.folder / "logs" / f"{task.stage}.log").read_text("utf-8")
    assert (run.outputs["report"].parent / "report").read_text("utf-8") == "<p>report"
    assert sorted(engine.removed) == sorted(package.stages)
    for started in engine.started:
        assert started.image == f"vitpipe-{all_stages()[started.command[2]].image}:0.1.0"
        assert started.shm_size == "3g"
        assert started.user.split(":")[0].isdigit()
        assert started.environment["HOME"] == "/tmp"
        assert started.mounts == []


def test_arguments_reach_the_stages(package, engine, tmp_path):
    run = run_locally(package.path, root=tmp_path, arguments={"overrides": []})
    assert open_artifact(run.outputs["prepare"]).metrics["num_overrides"] == 0


def test_development_mode_data_and_plugins_are_mounted_read_only(package, engine, tmp_path, monkeypatch):
    data, plugin = tmp_path / "data", tmp_path / "my_methods"
    data.mkdir()
    plugin.mkdir()
    monkeypatch.setenv("VITPIPE_PLUGINS", str(plugin))
    run_locally(package.path, root=tmp_path / "runs", data=data, development=True)
    mounts = engine.started[0].mounts
    assert all(mount["ReadOnly"] and mount["Source"] == mount["Target"] for mount in mounts)
    assert {str(data), str(plugin)} <= {mount["Source"] for mount in mounts}
    assert engine.started[0].environment["VITPIPE_PLUGINS"] == str(plugin)
    assert len(mounts) >= 3


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "FAIL_STAGE",
            r"Stage 'detect' did not finish \(exit code 3\). Last output: working on detect | it broke",
        ),
        ("QUIET_STAGE", "Stage 'detect' did not finish"),
        ("LIE_STAGE", "Stage 'detect' left a receipt that does not match its card.json"),
    ],
)
def test_a_stage_that_fails_is_named(package, engine, tmp_path, monkeypatch, variable, message):
    monkeypatch.setenv(variable, "detect")
    with pytest.raises(EngineError, match=message.replace("|", r"\|")) as caught:
        run_locally(package.path, root=tmp_path)
    assert caught.value.where.endswith("detect.log")
    assert "dvc repro" in caught.value.fix
    assert len(engine.removed) == len(engine.started)


def test_an_image_with_other_code_is_refused(package, engine, tmp_path):
    text = package.path.read_text(encoding="utf-8")
    digest = text.partition("code_digest:\n              runtimeValue:\n                constant: ")[
        2
    ].split()[0]
    other = tmp_path / "other.yaml"
    other.write_text(text.replace(digest, "f" * 64), encoding="utf-8")
    with pytest.raises(EngineError, match="other code than the pipeline was compiled from"):
        run_locally(other, root=tmp_path / "runs")


def test_an_interrupt_leaves_no_container(package, engine, tmp_path, monkeypatch):
    def interrupted(*_args, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("codecs.getincrementaldecoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_locally(package.path, root=tmp_path)
    assert engine.removed == ["prepare"]


def test_without_docker_the_other_way_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(EngineError, match="No Docker engine answers") as caught:
        run_locally(package.path, root=tmp_path / "runs")
    assert "dvc repro" in caught.value.fix
    assert not (tmp_path / "runs").exists()


def test_a_missing_image(package, tmp_path, monkeypatch):
    monkeypatch.setattr(docker, "from_env", lambda: DockerDouble(images=()))
    with pytest.raises(EngineError, match="does not exist locally and cannot be pulled"):
        run_locally(package.path, root=tmp_path / "runs")


def test_a_missing_data_folder(package, tmp_path):
    with pytest.raises(InputError, match="data folder does not exist"):
        run_locally(package.path, root=tmp_path, data=tmp_path / "none")


@pytest.mark.docker
def test_no_failed_container_is_taken_for_a_success(real_engine, tmp_path):
    containers = Containers(tmp_path)
    for code in (3, 0, 1) * 7:
        command = ["sh", "-c", f"echo last words; exit {code}"]
        assert containers.run(real_engine, DEV_IMAGE, command, {}) == code
        assert containers.last_lines(command[2]) == "last words"


@pytest.mark.docker
def test_a_real_stage_runs_in_a_container(real_engine, tmp_path):
    sizes = ["train_images=20", "val_images=10", "scene_train_images=2", "scene_val_images=2", "videos=1"]
    overrides = [f"data.embedded.{size}" for size in sizes] + ["data.sets=[imagenet]", "stages=[prepare]"]
    images = {"train": DEV_IMAGE, "dense": DEV_IMAGE}
    compiled = compile_pipeline("itpn/pixel_base", "demo", overrides, tmp_path / "p.yaml", images=images)
    run = run_locally(compiled.path, root=tmp_path / "runs", development=True)
    assert open_artifact(run.outputs["prepare"], "prepare").card.data_digest
