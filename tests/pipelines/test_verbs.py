"""The verbs `compile`, `local` and `submit` as the command line offers them."""

from __future__ import annotations

import json
import subprocess
import sys

import docker
import pytest
import typer
import yaml
from docker_double import DockerDouble
from engine_trials import PROFILE, RECIPE
from typer.testing import CliRunner

from pipelines.package import validate_package
from pipelines.verbs import register
from vitpipe.contracts.errors import ArtifactError, EngineError, InputError
from vitpipe.stages.report.stage import results_of_folder
from vitpipe.verbs.run_folders import chosen_runs, store_of_run

app = typer.Typer()
register(app)


def call(*words):
    """Run a verb in this process; a typed error comes out as itself."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a params.yaml."""
    monkeypatch.chdir(tmp_path)
    params = {"recipe": RECIPE, "profile": PROFILE, "overrides": ["seed=4"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return tmp_path


def test_compile_takes_recipe_and_overrides_from_params(folder):
    said = call("compile", "--set", "finetune.epochs=2", "--image", "train=here/train@sha256:abc")
    package = validate_package(folder / "build" / "pipeline.yaml")
    assert package.parameters["overrides"] == ["seed=4"]
    assert "finetune.epochs=2" in package.path.read_text(encoding="utf-8")
    assert "pipeline itpn-pixel-base-demo" in said
    assert "does not detect: vitpipe-dense:0.1.0. Fix: give --image" in said


def test_compile_writes_dvc_yaml_too(folder):
    assert "written" in call("compile", "--dvc")
    assert "up to date" in call("compile", "--dvc")
    assert "finetune" in yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


@pytest.mark.parametrize("wrong", ["train", "=x", "traim=x"])
def test_a_wrong_image_is_refused(wrong, folder):
    with pytest.raises(InputError, match="NAME=VALUE"):
        call("compile", "--image", wrong)
    assert not (folder / "build").exists()


def test_submit_compiles_and_sends(kfp_api):
    said = call("submit", "--endpoint", kfp_api.endpoint, "--argument", "overrides=[seed=7]", "--json")
    assert json.loads(said)["run_id"] == "r0"
    assert kfp_api.runs[0]["runtime_config"]["parameters"] == {"overrides": ["seed=7"]}


def test_local_without_docker_says_what_else_to_do(folder, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/no.sock")
    with pytest.raises(EngineError, match="dvc repro"):
        call("local", "--dev")


def test_two_calls_share_no_package(folder, kfp_api, monkeypatch):
    call("submit", "--endpoint", kfp_api.endpoint)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/no.sock")
    with pytest.raises(EngineError):
        call("local", "--dev")
    # A file of a fixed name would be run by whoever reads it next.
    assert not list(folder.rglob("*.yaml"))[1:], "beside params.yaml"


@pytest.mark.parametrize(
    "given", [("--recipe", RECIPE), ("--profile", "demo"), ("--set", "seed=1"), ("--image", "train=x")]
)
@pytest.mark.parametrize("verb", [("local",), ("submit", "--endpoint", "http://127.0.0.1:9")])
def test_what_would_be_ignored_beside_a_package_is_refused(verb, given):
    with pytest.raises(InputError, match=f"--package is given together with {given[0]}, which would be"):
        call(*verb, "--package", "p.yaml", *given)


def test_placement_beside_a_package_is_refused():
    with pytest.raises(InputError, match="together with --placement"):
        call("submit", "--endpoint", "http://127.0.0.1:9", "--package", "p.yaml", "--placement", "gke.yaml")


@pytest.mark.parametrize(
    "given",
    [("--recipe", RECIPE), ("--argument", "overrides=[]"), ("--data", "/d"), ("--dev",), ("--out", "x")],
)
def test_what_would_be_ignored_beside_a_resumed_run_is_refused(given):
    with pytest.raises(InputError, match=f"--resume is given together with {given[0]}"):
        call("local", "--resume", "artifacts/local/run", *given)


def test_a_local_run_is_shown_by_verdict_and_report(folder, monkeypatch, stand_in):
    """Its folder is one of a run like `artifacts/RECIPE/PROFILE`, and its store is named."""
    monkeypatch.setattr(docker, "from_env", DockerDouble)
    monkeypatch.delenv("VITPIPE_TRACKING", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = call("local", "--set", "stages=[prepare, pretrain, report]")
    (run,) = (folder / "artifacts" / "local").glob("itpn*")
    assert f"pretrain     {run / 'pretrain'}" in said
    assert f"vitpipe verdict {run}` shows the verdict" in said
    assert f"sqlite:///{folder}/artifacts/local/mlflow/mlflow.db".replace(f"{folder}/", "") in said
    assert validate_package(run / "pipeline.yaml").stages == ("prepare", "pretrain", "report")
    results = results_of_folder(run)
    assert set(results.artifacts) == {"prepare", "pretrain", "report"}
    assert str(store_of_run(run)) == f"sqlite:///{folder}/artifacts/local/mlflow/mlflow.db"
    with pytest.raises(ArtifactError, match="has not run yet") as caught:
        chosen_runs(None, folder / "params.yaml")
    assert f"the newest one of `vitpipe local`: {run.relative_to(folder)}" in caught.value.fix


def test_listing_the_verbs_imports_neither_kfp_nor_torch():
    code = "import sys, pipelines.verbs; print([m for m in ('kfp', 'torch', 'docker', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
