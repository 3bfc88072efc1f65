"""The local run: the whole package in containers, truthful about every way to fail."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import docker
import pytest
from docker_double import DockerDouble, signal_when

from pipelines.compile import compile_pipeline
from pipelines.local import DEV_IMAGE, LocalOptions, run_locally
from pipelines.local_containers import Containers
from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.errors import EngineError, InputError, StoppedError
from vitpipe.contracts.graph import all_stages
from vitpipe.stages.pipeline_run import CONCLUSION

pytestmark = pytest.mark.slow


def test_every_stage_runs_by_its_compiled_command(package, engine, tmp_path, capsys):
    run = run_locally(package.path, LocalOptions(shm_gib=3, memory_gib=1.5), root=tmp_path / "runs")
    assert list(run.outputs) == list(package.stages)
    assert engine.stages() == list(package.stages)
    for task in package.tasks:
        folder = run.outputs[task.stage]
        assert folder == run.folder / task.stage
        artifact = open_artifact(folder, task.stage)
        assert artifact.card.recipe == "itpn/pixel_base"
        assert artifact.metrics["num_inputs"] == len(task.inputs)
        own = {"finetune": 2, "evaluate": 2, "report": 2}
        assert artifact.metrics["num_overrides"] == own.get(task.stage, 1)
        messages = run.folder / "kubeflow" / task.stage
        output = json.loads((messages / "executor_output.json").read_text(encoding="utf-8"))
        metadata = output["artifacts"]["out"]["artifacts"][0]["metadata"]
        assert metadata["code_digest"] == artifact.card.code_digest
        assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"] == artifact.metrics
        assert f"working on {task.stage}" in (run.folder / "logs" / f"{task.stage}.log").read_text("utf-8")
    assert (run.folder / "kubeflow" / "report" / "report").read_text("utf-8") == "<p>report"
    assert sorted(engine.removed) == sorted([*package.stages, CONCLUSION])
    assert "all is well" in (run.folder / "kubeflow" / CONCLUSION / "report").read_text("utf-8")
    for started in engine.started[:-1]:
        stage = started.command[2]
        assert started.image == f"vitpipe-{all_stages()[stage].image}:0.1.0"
        assert started.command[-2:] == ["--state", str(run.folder / f".{stage}.state")]
        assert started.shm_size == "3g"
        assert started.mem_limit == started.memswap_limit == 1.5 * 2**30
        assert started.user.split(":")[0].isdigit()
        assert started.environment["HOME"] == "/tmp"
        # Certificates that the environment names.
        assert all(Path(mount["Source"]).is_file() for mount in started.mounts)
    said = capsys.readouterr().err
    assert f"=== prepare (1 of {len(package.stages) + 1})" in said
    assert "\nprepare: working on prepare\n" in said


def test_arguments_reach_the_stages(short, engine, tmp_path):
    run = run_locally(short.path, LocalOptions({"overrides": []}), root=tmp_path)
    assert open_artifact(run.outputs["prepare"]).metrics["num_overrides"] == 0


def test_development_mode_data_and_plugins_are_mounted_read_only(short, engine, tmp_path, monkeypatch):
    data, plugin = tmp_path / "data", tmp_path / "my_methods"
    data.mkdir()
    plugin.mkdir()
    monkeypatch.setenv("VITPIPE_PLUGINS", str(plugin))
    run_locally(short.path, LocalOptions(data=data, development=True), root=tmp_path / "runs")
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
def test_a_stage_that_fails_is_named(short, engine, tmp_path, monkeypatch, variable, message):
    monkeypatch.setenv(variable, "detect")
    with pytest.raises(EngineError, match=message.replace("|", r"\|")) as caught:
        run_locally(short.path, root=tmp_path)
    assert caught.value.where.endswith("detect.log")
    assert caught.value.exit_code == 1
    assert "vitpipe local --resume" in caught.value.fix
    assert "dvc repro" in caught.value.fix
    assert len(engine.removed) == len(engine.started)


def test_what_does_not_need_the_failed_stage_runs(short, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL_STAGE", "finetune")
    with pytest.raises(EngineError, match=r"'finetune'.*Not started without it: report"):
        run_locally(short.path, root=tmp_path)
    assert engine.stages() == ["prepare", "pretrain", "finetune", "detect"]


def test_a_failed_run_has_a_report_of_what_has_finished(short, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL_STAGE", "detect")
    with pytest.raises(EngineError, match="Stage 'detect' did not finish"):
        run_locally(short.path, root=tmp_path)
    assert engine.stages() == ["prepare", "pretrain", "finetune", "detect"]
    (run,) = tmp_path.glob("itpn*")
    assert open_artifact(run / CONCLUSION).card.stage == "report"
    assert not (run / "report").exists()


def test_an_image_with_other_code_is_refused(short, engine, tmp_path):
    text = short.path.read_text(encoding="utf-8")
    digest = text.partition("code_digest:\n              runtimeValue:\n                constant: ")[
        2
    ].split()[0]
    other = tmp_path / "other.yaml"
    other.write_text(text.replace(digest, "f" * 64), encoding="utf-8")
    with pytest.raises(EngineError, match="other code than the pipeline was compiled from"):
        run_locally(other, root=tmp_path / "runs")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_container_which_saves_its_state(
    short, engine, tmp_path, monkeypatch, number, code
):
    monkeypatch.setenv("SLOW_STAGE", "pretrain")

    def when_it_waits(container):
        if container.labels["vitpipe.task"] == "pretrain":
            signal_when(container, number, "waiting", lambda number: os.kill(os.getpid(), number))

    engine.on_start = when_it_waits
    with pytest.raises(StoppedError, match="Stopped in stage 'pretrain'; finished: prepare") as caught:
        run_locally(short.path, root=tmp_path)
    assert caught.value.exit_code == code
    assert f"vitpipe local --resume {caught.value.where}" in caught.value.fix
    (log,) = tmp_path.glob("*/logs/pretrain.log")
    assert "state saved" in log.read_text(encoding="utf-8")
    assert engine.removed == ["prepare", "pretrain"]
    assert not engine.all


def test_an_engine_that_stops_is_one_paragraph(short, engine, tmp_path):
    def goes(container):
        engine.is_gone = container.labels["vitpipe.task"] == "pretrain"

    engine.on_start = goes
    with pytest.raises(
        EngineError, match=r"The Docker engine failed while 'pretrain'.*finished: prepare"
    ) as e:
        run_locally(short.path, root=tmp_path)
    assert "\n" not in str(e.value)
    assert "start Docker again" in e.value.fix
    assert "--resume" in e.value.fix


def test_a_container_that_does_not_start_is_removed(short, engine, tmp_path):
    engine.unable_to_start = ("detect",)
    with pytest.raises(EngineError, match=r"'detect' did not finish \(the container did not start: exec: no"):
        run_locally(short.path, root=tmp_path)
    assert "detect" in engine.removed
    assert not engine.all


def test_without_docker_the_other_way_is_named(short, tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(EngineError, match="No Docker engine answers") as caught:
        run_locally(short.path, root=tmp_path / "runs")
    assert "dvc repro" in caught.value.fix
    assert not (tmp_path / "runs").exists()


def test_a_missing_image(short, tmp_path, monkeypatch):
    monkeypatch.setattr(docker, "from_env", lambda: DockerDouble(images=()))
    with pytest.raises(EngineError, match="does not exist locally and cannot be pulled"):
        run_locally(short.path, root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_missing_data_folder(short, tmp_path):
    with pytest.raises(InputError, match="data folder does not exist"):
        run_locally(short.path, LocalOptions(data=tmp_path / "none"), root=tmp_path)


@pytest.mark.docker
def test_no_failed_container_is_taken_for_a_success(real_engine, tmp_path):
    containers = Containers(real_engine, tmp_path, lambda line: None)
    for code in (3, 0, 1) * 7:
        command = ["sh", "-c", f"echo last words; exit {code}"]
        assert containers.run("task", DEV_IMAGE, command).code == code
        assert containers.last_lines("task").endswith("last words")


@pytest.mark.docker
def test_a_real_container_that_does_not_start_is_removed(real_engine, tmp_path):
    labels = {"vitpipe.run": str(tmp_path)}
    ended = Containers(real_engine, tmp_path, print).run(
        "task", DEV_IMAGE, ["no-such-program"], labels=labels
    )
    assert ended.code is None
    assert "no-such-program" in str(ended)
    assert not real_engine.containers.list(all=True, filters={"label": f"vitpipe.run={tmp_path}"})


@pytest.mark.docker
def test_too_little_memory_is_named(real_engine, tmp_path):
    command = ["python3", "-c", "x = bytearray(10**9)"]
    ended = Containers(real_engine, tmp_path, print).run(
        "task", DEV_IMAGE, command, mem_limit=2**26, memswap_limit=2**26
    )
    assert ended.code == 137
    assert "--memory" in str(ended)


@pytest.mark.docker
def test_a_real_stage_runs_in_a_container(real_engine, tmp_path, monkeypatch):
    monkeypatch.delenv("VITPIPE_TRACKING", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sizes = ["train_images=20", "val_images=10", "scene_train_images=2", "scene_val_images=2", "videos=1"]
    overrides = [f"data.embedded.{size}" for size in sizes] + ["data.sets=[imagenet]", "stages=[prepare]"]
    images = {"train": DEV_IMAGE, "dense": DEV_IMAGE}
    compiled = compile_pipeline("itpn/pixel_base", "demo", overrides, tmp_path / "p.yaml", images=images)
    run = run_locally(compiled.path, LocalOptions(development=True), root=tmp_path / "runs")
    assert open_artifact(run.outputs["prepare"], "prepare").card.data_digest
    assert (tmp_path / "runs" / "mlflow" / "mlflow.db").is_file()
