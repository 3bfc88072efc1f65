"""A stage that joins by two files, in a plugin or in the package itself: every verb, engine and the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from toy_project import TOY, make_project, must, planned, write

import components
import pipelines
import vitpipe
from pipelines.lint import leaf_tasks

STAGES = ["prepare", "finetune", "spectrum", "evaluate", "report"]
SUMMARY = "spectrum: eigenvalues of the covariance of frozen features"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The project with all of its stages run; tests do not change it."""
    project = make_project(tmp_path_factory.mktemp("own_stage"))
    for stage in STAGES:
        must(project, "run", stage)
    return project


def metrics(project: Path, stage: str) -> dict[str, float]:
    return json.loads((project / f"artifacts/lab/toy/demo/{stage}/metrics.json").read_text())


def test_the_verbs_and_engines_know_it(tmp_path):
    project = make_project(tmp_path)
    assert "lab/toy" in must(project, "recipes")
    assert list(planned(project)) == STAGES
    must(project, "compile", "--dvc")
    stage = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]["spectrum"]
    assert (stage["cmd"], stage["desc"]) == ("vitpipe run spectrum", SUMMARY)
    assert [Path(name).name for name in stage["deps"]] == ["spectrum.json", "prepare", "finetune"]
    # `identity` compares dvc.yaml with the graph.
    must(project, "identity")
    written = json.loads((project / "artifacts/lab/toy/demo/identity/spectrum.json").read_text())
    assert written["stage"] == "spectrum"


def test_kubeflow_gets_its_component(tmp_path):
    project = make_project(tmp_path)
    must(project, "compile", "--out", "package.yaml", "--image", "train=registry.example/mine:1")
    package = next(yaml.safe_load_all((project / "package.yaml").read_text()))
    (task,) = (task for name, task, _ in leaf_tasks(package) if name == "spectrum")
    feeders = {
        name: found["taskOutputArtifact"]["producerTask"]
        for name, found in task["inputs"]["artifacts"].items()
    }
    assert feeders == {"data": "prepare", "weights": "finetune"}
    container = package["deploymentSpec"]["executors"]["exec-spectrum"]["container"]
    assert container["image"] == "registry.example/mine:1"
    assert container["command"] == ["vitpipe", "run", "spectrum"]
    assert package["components"]["comp-spectrum"]["outputDefinitions"]["artifacts"].keys() == {
        "out",
        "metrics",
    }


def test_it_runs_and_is_reported_in_its_place(finished):
    rank = metrics(finished, "spectrum")["effective_rank"]
    assert 1.0 < rank <= 12.0
    folder = finished / "artifacts/lab/toy/demo"
    rows = (folder / "spectrum/tables/eigenvalues.csv").read_text().splitlines()
    assert rows[0] == "number,value"
    assert len(rows) == 5
    text, page = ((folder / f"report/report.{kind}").read_text() for kind in ("md", "html"))
    assert f"| effective rank | {rank:.4g} |" in text
    sections = [line.split()[1] for line in text.splitlines() if line.startswith("### ")]
    # In the order of interest: results before the training that led to them.
    assert [name for name in sections if name in STAGES] == ["evaluate", "spectrum", "finetune"]
    assert f"{rank:.4g}" in page
    assert ">spectrum<" in page  # in the graph


def test_an_edit_of_its_file_runs_it_and_the_report_again(finished, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(finished, project)
    assert set(planned(project).values()) == {"cached"}
    code = project / "mine/stages/spectrum/stage.py"
    text = code.read_text()
    code.write_text(
        text.replace('"""Write', '"""Another docstring. Write').replace("    _, val", "    # why\n    _, val")
    )
    assert set(planned(project).values()) == {"cached"}
    code.write_text(text.replace("_BATCH = 16", "_BATCH = 8"))
    runs = {stage for stage, found in planned(project).items() if found == "runs"}
    assert runs == {"spectrum", "report"}
    # A value of its section, too.
    code.write_text(text)
    write(
        project / "params.yaml",
        (project / "params.yaml").read_text() + "overrides: [spectrum.num_values=2]\n",
    )
    runs = {stage for stage, found in planned(project).items() if found == "runs"}
    assert runs == {"spectrum", "report"}


@pytest.mark.slow
def test_ranks_and_loader_processes_find_the_plugin(finished, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(finished, project)
    alone = metrics(project, "spectrum")["effective_rank"]
    workers = ("--set", "data.workers=1")
    must(project, "run", "finetune", "--ranks", "2", *workers)
    must(project, "run", "spectrum", "--ranks", "2", *workers)
    assert metrics(project, "spectrum")["effective_rank"] == pytest.approx(alone, rel=1e-4)


def test_in_the_package_itself_it_changes_no_other_stage(tmp_path):
    place = tmp_path / "copy"
    for package in (vitpipe, components, pipelines):
        folder = Path(package.__file__).parent
        shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    project = make_project(tmp_path / "project")
    shutil.rmtree(project / "mine/stages")

    def identities(*options: str) -> dict[str, dict[str, str]]:
        out = tmp_path / "identity"
        must(project, "identity", "--out", str(out), *options, PYTHONPATH=str(place))
        return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}

    before = identities("--set", "stages=[prepare, finetune, evaluate]")
    shutil.copytree(TOY / "stages/spectrum", place / "vitpipe/stages/spectrum")
    after = identities()
    assert {name: after[name] for name in before} == before
    assert set(after) == set(STAGES)
    code = place / "vitpipe/stages/spectrum/stage.py"
    code.write_text(code.read_text().replace("_BATCH = 16", "_BATCH = 8"))
    edited = identities()
    assert {name for name in after if after[name] != edited[name]} == {"spectrum"}
    must(project, "compile", "--dvc", PYTHONPATH=str(place))
    assert yaml.safe_load((project / "dvc.yaml").read_text())["stages"]["spectrum"]["desc"] == SUMMARY
