"""A real run in containers of which one is killed: the others go on, what has finished is reported, exit code 1."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from engine_trials import PROFILE, RECIPE, ROOT, TINY

from pipelines.compile import compile_pipeline
from pipelines.local import DEV_IMAGE
from pipelines.local_containers import RUN_LABEL, TASK_LABEL
from vitpipe.contracts.artifact import open_artifact
from vitpipe.stages.pipeline_run import CONCLUSION

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]
SECONDS = 900


def test_a_killed_detection_is_reported_with_what_has_finished(real_engine, tmp_path):
    overrides = [*TINY, "stages=[prepare, finetune, detect, report]", "detect.epochs=500"]
    images = {"train": DEV_IMAGE, "dense": DEV_IMAGE}
    package = compile_pipeline(RECIPE, PROFILE, overrides, tmp_path / "pipeline.yaml", images=images)
    command = [sys.executable, "-m", "vitpipe", "local", "--dev"]
    command += ["--package", str(package.path), "--out", str(tmp_path / "runs")]
    driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + SECONDS
    try:
        while not (found := real_engine.containers.list(filters={"label": f"{TASK_LABEL}=detect"})):
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        while "step" not in found[0].logs().decode():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        found[0].kill(signal="SIGKILL")
        said = driver.communicate(timeout=SECONDS)[1]
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 1, said
    assert "'detect' did not finish (exit code 137, killed (SIGKILL)" in " ".join(said.split())
    assert "Traceback" not in said
    (run,) = (tmp_path / "runs").glob("itpn*")
    assert not real_engine.containers.list(all=True, filters={"label": f"{RUN_LABEL}={run}"})
    assert open_artifact(run / "finetune").metrics["top1"] >= 0.0
    report = open_artifact(run / CONCLUSION)
    assert set(report.card.parents) == {"prepare", "finetune"}
    assert "stage detect did not run" in (run / CONCLUSION / "verdict.md").read_text("utf-8")
    assert not (run / "detect").exists()
