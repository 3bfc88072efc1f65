"""The first tasks of a package: which there are, what stands behind them, and what they find in a pod."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.compile import compile_pipeline
from pipelines.lint import leaf_tasks
from pipelines.package import validate_package
from pipelines.package_tasks import read_tasks, without_checks
from pipelines.placement import Placement
from vitpipe.config.read import load_recipe
from vitpipe.contracts.graph import all_stages
from vitpipe.stages.run import identity_of
from vitpipe.verbs.pod_probes import examine_code, examine_readable, examine_shm, examine_writable

RECIPE = "itpn/pixel_base"
PLACEMENT = Placement.model_validate(
    {
        "claims": {"data": {"name": "sets", "path": "/data"}, "state": {"name": "state", "path": "/state"}},
        "tracking": {"uri": "http://mlflow:5000"},
    }
)


def compiled(path: Path, profile: str = "full", **options):
    options = {"placement": PLACEMENT, **options}
    return compile_pipeline(
        RECIPE, profile, ["data.root=/data"] if profile == "full" else [], path, **options
    )


def test_one_check_per_image_and_one_on_a_gpu(tmp_path):
    path = compiled(tmp_path / "p.yaml").path
    spec = next(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    tasks = {name: task for name, task, _ in leaf_tasks(spec)}
    checks = sorted(name for name in tasks if name.startswith("check-"))
    assert checks == ["check-dense", "check-gpu", "check-train"]
    assert sorted(tasks["prepare"]["dependentTasks"]) == checks
    containers = {name: spec["deploymentSpec"]["executors"][f"exec-{name}"]["container"] for name in checks}
    words = {name: " ".join(container["args"]) for name, container in containers.items()}
    assert words["check-train"].endswith("--shm-gib 1 --writable /state --readable /data --mlflow")
    assert words["check-gpu"].endswith("--gpus 1")
    assert [name for name in checks if "accelerator" in containers[name]["resources"]] == ["check-gpu"]
    # A cluster may have changed since the last run.
    assert all("enableCache" not in tasks[name].get("cachingOptions", {}) for name in checks)
    digests = json.loads(
        tasks["check-dense"]["inputs"]["parameters"]["code_digests"]["runtimeValue"]["constant"]
    )
    recipe = load_recipe(RECIPE, "full", ["data.root=/data"])
    assert digests == {
        name: identity_of(recipe, all_stages()[name])["code_digest"] for name in ("detect", "segment")
    }


def test_nothing_is_checked_without_a_cluster_and_no_gpu_for_a_demo(tmp_path):
    def checks(path: Path) -> set[str]:
        return {task.name for task in read_tasks(path) if task.name.startswith("check-")}

    assert not checks(compiled(tmp_path / "plain.yaml", placement=None).path)
    assert checks(compiled(tmp_path / "demo.yaml", "demo").path) == {"check-train", "check-dense"}


def test_a_local_run_leaves_the_checks_out(tmp_path):
    path = compiled(tmp_path / "demo.yaml", "demo").path
    tasks = without_checks(read_tasks(path))
    assert [task.name for task in tasks][:2] == ["prepare", "pretrain"]
    assert not tasks[0].after
    assert set(validate_package(path).stages) == {task.stage for task in tasks if task.stage}


def test_what_a_volume_can_be(tmp_path):
    said, found = examine_writable(tmp_path)
    assert said.startswith("writable")
    assert (found, list(tmp_path.iterdir())) == ([], [])  # the probe is gone
    (mistake,) = examine_writable(tmp_path / "absent")[1]
    assert (mistake.level, mistake.where) == ("error", str(tmp_path / "absent"))
    assert "ReadWriteMany" in mistake.fix
    (empty,) = examine_readable(tmp_path)[1]
    assert "empty" in empty.what
    assert examine_readable(tmp_path / "absent")[1]
    (tmp_path / "imagenet").mkdir()
    assert examine_readable(tmp_path) == ("1 entry", [])


def test_shared_memory_has_to_hold_what_is_promised():
    assert examine_shm(0.001)[1] == []
    (mistake,) = examine_shm(10**6)[1]
    assert "bus error" in mistake.what


def test_other_code_is_found_before_the_first_stage():
    recipe = load_recipe(RECIPE, "demo")
    digest = identity_of(recipe, all_stages()["finetune"])["code_digest"]
    assert examine_code(recipe, {"finetune": digest}) == ("1 stage compared", [])
    (mistake,) = examine_code(recipe, {"finetune": digest, "probe": "f" * 64})[1]
    assert ("other code" in mistake.what, mistake.where) == (True, "stage probe")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--writable", "{here}", "--shm-gib", "0.001"], 0, "writable"),
        (["--writable", "{here}/absent", "--gpus", "1"], 2, "not 1; it is built for"),
        # Nobody listens at port 9.
        (["--mlflow"], 2, "127.0.0.1:9"),
    ],
)
def test_the_verb_in_a_pod(tmp_path, monkeypatch, options, code, said):
    monkeypatch.delenv("VITPIPE_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    out = tmp_path / "out"
    message = {
        "inputs": {"parameterValues": {"code_digests": "{}"}},
        "outputs": {
            "artifacts": {"out": {"artifacts": [{"name": "out", "uri": str(out)}]}},
            "outputFile": str(tmp_path / "executor_output.json"),
        },
    }
    command = [sys.executable, "-m", "vitpipe", "check-pod", "--recipe", RECIPE, "--profile", "demo"]
    command += ["--executor-input", json.dumps(message)]
    command += [word.format(here=tmp_path) for word in options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in " ".join(done.stdout.split())
    assert [row["what"] for row in json.loads(out.read_text(encoding="utf-8"))][-1] == "code"
    assert (tmp_path / "executor_output.json").exists() == (code == 0)
    assert "Traceback" not in done.stderr
