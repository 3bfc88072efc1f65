"""What an earlier local run has finished is taken over; a run that was cut goes on, in the middle of a stage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import docker
import pytest
import yaml
from docker_double import DockerDouble
from engine_trials import ROOT, TINY

from pipelines.compile import compile_pipeline
from pipelines.lint import leaf_tasks
from pipelines.local import DEV_IMAGE, LocalOptions, resume_run, run_locally
from pipelines.local_containers import RUN_LABEL
from vitpipe.config.digest import file_digest
from vitpipe.contracts.artifact import WEIGHTS, open_artifact
from vitpipe.contracts.errors import ArtifactError, EngineError, InputError
from vitpipe.stages.folder_lock import locked_folders
from vitpipe.verbs.run_folders import newest_local_run

pytestmark = pytest.mark.slow

SMALL = ["stages=[prepare]"]
STAGES = ["prepare", "pretrain", "finetune", "detect", "report"]


def test_an_equal_run_does_nothing_again(short, engine, tmp_path, capsys):
    first = run_locally(short.path, root=tmp_path)
    engine.started.clear()
    again = run_locally(short.path, root=tmp_path)
    assert engine.stages() == []
    assert again.folder != first.folder
    said = capsys.readouterr().err
    for stage, folder in again.outputs.items():
        assert open_artifact(folder, stage).card == open_artifact(first.outputs[stage], stage).card
        assert (folder / "card.json").samefile(first.outputs[stage] / "card.json")
        assert f"=== {stage}: taken from {first.outputs[stage]}, which has the same recipe" in said
    assert (again.folder / "kubeflow" / "report" / "report").is_file()
    message = (again.folder / "kubeflow" / "report" / "executor_output.json").read_text("utf-8")
    assert first.folder.name not in message
    run_locally(short.path, root=tmp_path, reuses=False)
    assert engine.stages() == STAGES


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        ({"finetune_overrides": ["finetune.epochs=5"]}, ["finetune", "report"]),
        # Of a stage that is not here.
        ({"overrides": ["segment.steps=5"]}, []),
    ],
)
def test_only_what_an_override_concerns_runs_again(short, engine, tmp_path, arguments, runs):
    run_locally(short.path, root=tmp_path)
    engine.started.clear()
    run_locally(short.path, LocalOptions(arguments), root=tmp_path)
    assert engine.stages() == runs


def test_another_image_and_a_changed_output_run_again(short, engine, tmp_path):
    first = run_locally(short.path, root=tmp_path)
    engine.started.clear()
    (first.outputs["pretrain"] / "metrics.json").write_text("{}", encoding="utf-8")
    run_locally(short.path, root=tmp_path)
    # Its new output has the same card, so nothing behind it runs.
    assert engine.stages() == ["pretrain"]
    images = {"train": "another/image@sha256:" + "0" * 64}
    other = compile_pipeline("itpn/pixel_base", "demo", SMALL, tmp_path / "other.yaml", images=images)
    engine.started.clear()
    run_locally(other.path, root=tmp_path)
    assert engine.stages()[0] == "prepare"


def test_a_failed_run_goes_on_in_its_folder(short, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL_STAGE", "pretrain")
    with pytest.raises(EngineError, match=r"Not started without it: finetune, detect, report") as caught:
        run_locally(short.path, LocalOptions(shm_gib=3), root=tmp_path)
    folder = caught.value.fix.partition("--resume ")[2].partition("`")[0]
    monkeypatch.delenv("FAIL_STAGE")
    engine.started.clear()
    run = resume_run(Path(folder), memory_gib=2.0, reuses=False)
    assert str(run.folder) == folder
    assert engine.stages() == STAGES[1:]
    assert engine.started[0].shm_size == "3g"
    assert engine.started[0].mem_limit == 2 * 2**30
    log = (run.folder / "logs" / "pretrain.log").read_text("utf-8")
    assert log.splitlines() == ["working on pretrain", "it broke", "working on pretrain"]


def test_what_is_no_run_is_not_resumed(tmp_path):
    with pytest.raises(ArtifactError, match="no local run in this folder"):
        resume_run(tmp_path)


def test_a_run_is_not_run_twice_at_once(short, engine, tmp_path):
    run = run_locally(short.path, root=tmp_path)
    with locked_folders(run.folder), pytest.raises(ArtifactError, match="This run is running"):
        resume_run(run.folder)


def test_with_dev_changed_code_is_said_before_a_container_starts(engine, tmp_path):
    images = {"train": DEV_IMAGE, "dense": DEV_IMAGE}
    compiled = compile_pipeline("itpn/pixel_base", "demo", SMALL, tmp_path / "p.yaml", images=images)
    pipeline, *platform = yaml.safe_load_all(compiled.path.read_text(encoding="utf-8"))
    (task,) = (task for name, task, _ in leaf_tasks(pipeline) if name == "prepare")
    task["inputs"]["parameters"]["code_digest"]["runtimeValue"]["constant"] = "f" * 64
    compiled.path.write_text(yaml.safe_dump_all([pipeline, *platform]), encoding="utf-8")
    with pytest.raises(InputError, match="code has changed since this package was compiled"):
        run_locally(compiled.path, LocalOptions(development=True), root=tmp_path / "runs")
    assert not engine.started


def test_the_newest_run_is_named_where_none_is_chosen(short, engine, tmp_path):
    run_locally(short.path, root=tmp_path)
    last = run_locally(short.path, root=tmp_path)
    assert newest_local_run(tmp_path) == last.folder
    assert newest_local_run(tmp_path / "none") is None


# The real stages, in the middle of a training.

DEVELOPMENT = LocalOptions(development=True)
_CUT = [
    *TINY,
    "stages=[prepare, pretrain]",
    "data.sets=[imagenet]",
    "pretrain.epochs=6",
    "pretrain.checkpoint_minutes=0.0001",
]


@pytest.fixture(scope="module")
def cut_package(tmp_path_factory):
    """Two real stages that save their state after every step."""
    out = tmp_path_factory.mktemp("cut") / "pipeline.yaml"
    images = {"train": DEV_IMAGE, "dense": DEV_IMAGE}
    return compile_pipeline("itpn/pixel_base", "demo", _CUT, out, images=images)


@pytest.fixture(scope="module")
def unbroken(cut_package, tmp_path_factory):
    """That package run without a break, by processes instead of containers."""
    with pytest.MonkeyPatch.context() as patch:
        real_stages(patch)
        return run_locally(cut_package.path, DEVELOPMENT, root=tmp_path_factory.mktemp("unbroken"))


def real_stages(patch) -> DockerDouble:
    """An engine that runs processes; `vitpipe` is the real one."""
    double = DockerDouble()
    patch.setattr(docker, "from_env", lambda: double)
    patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return double


def with_prepared_data(unbroken, root: Path) -> Path:
    """A folder of runs where only `prepare` is finished, so that no test prepares anew."""
    shutil.copytree(unbroken.folder, root / "earlier", ignore=shutil.ignore_patterns("*pretrain*"))
    return root


def when_a_state_is_saved(root: Path, then) -> None:
    """Call `then` with the run's folder as soon as the training has saved a state."""

    def wait() -> None:
        while not (found := list(root.glob("itpn*/.pretrain.state/state-*.pt"))):
            threading.Event().wait(0.02)
        then(found[0].parents[1])

    threading.Thread(target=wait, daemon=True).start()


def weights(run) -> str:
    return file_digest(run.outputs["pretrain"] / WEIGHTS)


def log_of(run) -> str:
    return (run.folder / "logs" / "pretrain.log").read_text("utf-8")


@pytest.mark.parametrize("by", ["resume", "the same command"])
def test_a_killed_training_goes_on_to_the_same_weights(cut_package, unbroken, tmp_path, monkeypatch, by):
    double, root = real_stages(monkeypatch), with_prepared_data(unbroken, tmp_path)
    when_a_state_is_saved(root, lambda run: [os.killpg(it.process.pid, signal.SIGKILL) for it in double.all])
    with pytest.raises(EngineError, match=r"'pretrain' did not finish \(exit code 137"):
        run_locally(cut_package.path, DEVELOPMENT, root=root)
    (folder,) = root.glob("itpn*")
    assert not (folder / "pretrain").exists()
    run = resume_run(folder) if by == "resume" else run_locally(cut_package.path, DEVELOPMENT, root=root)
    assert double.stages() == ["pretrain", "pretrain"]
    assert "Resuming after step" in log_of(run)
    assert weights(run) == weights(unbroken)


@pytest.mark.docker
def test_a_killed_container_goes_on_to_the_same_weights(cut_package, unbroken, real_engine, tmp_path):
    root = tmp_path / "runs"  # not the prepared data: they were made in another image

    def kill(run: Path) -> None:
        for container in real_engine.containers.list(filters={"label": f"{RUN_LABEL}={run}"}):
            container.kill(signal="SIGKILL")

    when_a_state_is_saved(root, kill)
    with pytest.raises(EngineError, match=r"'pretrain' did not finish \(exit code 137"):
        run_locally(cut_package.path, DEVELOPMENT, root=root)
    (folder,) = root.glob("itpn*")
    run = resume_run(folder)
    assert "Resuming after step" in log_of(run)
    assert weights(run) == weights(unbroken)


@pytest.mark.docker
def test_a_container_whose_driver_was_killed_is_stopped(cut_package, unbroken, real_engine, tmp_path):
    """`kill -9` of `vitpipe local` leaves its container; --resume stops it and goes on."""
    root = tmp_path / "runs"
    command = [sys.executable, "-m", "vitpipe", "local", "--dev"]
    command += ["--package", str(cut_package.path), "--out", str(root)]
    driver = subprocess.Popen(command, cwd=ROOT)
    when_a_state_is_saved(root, lambda run: driver.kill())
    assert driver.wait() == -signal.SIGKILL
    (folder,) = root.glob("itpn*")
    label = {"label": f"{RUN_LABEL}={folder}"}
    assert real_engine.containers.list(filters=label), "the container works on"
    run = resume_run(folder)
    assert not real_engine.containers.list(all=True, filters=label)
    assert weights(run) == weights(unbroken)
