"""How a package's tasks are read: conditions of start, tasks in tasks, importers, what a container is told."""

# No `from __future__ import annotations`: kfp's decorators read the annotations as objects.

import json
from pathlib import Path

import pytest
from kfp import compiler, dsl

from pipelines.local_containers import Ended
from pipelines.local_graph import call_of, imported_places, outputs_of
from pipelines.local_tasks import TaskRunner
from pipelines.package_tasks import read_tasks
from vitpipe.contracts.errors import InputError
from vitpipe.stages.executor import ExecutorIO
from vitpipe.stages.state_folder import STATES_VARIABLE


@dsl.container_component
def make(text: str, number: int, out: dsl.Output[dsl.Model]):
    return dsl.ContainerSpec(
        image="made",
        command=["vitpipe", "run", "pretrain"],
        args=[
            *("--executor-input", "{{$}}", "--state", "/elsewhere"),
            dsl.IfPresentPlaceholder(input_name="text", then=["--text", text]),
        ],
    )


@dsl.container_component
def show(
    a: dsl.Input[dsl.Model] | None = None,
    b: dsl.Input[dsl.Model] | None = None,
):
    return dsl.ContainerSpec(image="shown", command=["show"], args=["{{$}}"])


@dsl.container_component
def say(status: str):
    return dsl.ContainerSpec(image="said", command=["say", status])


@dsl.component(base_image="said", install_kfp_package=False)
def end(status: dsl.PipelineTaskFinalStatus):
    print(status.state)


@dsl.pipeline(name="inner")
def inner(text: str) -> dsl.Model:
    made = make(text=text, number=2).set_env_variable("A", "b")
    return made.set_env_variable(STATES_VARIABLE, "/elsewhere").outputs["out"]


@dsl.pipeline(name="outer")
def outer(word: str = "w", place: str = "/nowhere"):
    with dsl.ExitHandler(end()):
        weights = dsl.importer(artifact_uri=place, artifact_class=dsl.Model, reimport=False)
        made = inner(text=word)
        show(a=made.output, b=weights.output).ignore_upstream_failure()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "outer.yaml"
    compiler.Compiler().compile(outer, str(path))
    return path


def test_tasks_in_tasks_run_as_if_outside(package):
    tasks = {task.name: task for task in read_tasks(package)}
    assert set(tasks) == {"importer", "make", "show", "end"}
    assert list(tasks)[-2:] == ["show", "end"]
    assert tasks["show"].always
    assert tasks["end"].always
    assert not tasks["make"].always
    assert tasks["show"].after == {"make", "importer"}
    assert tasks["end"].after == {"make", "importer", "show"}
    made = tasks["show"].artifacts["a"]
    assert (made.task, made.value) == ("make", "out")
    assert tasks["make"].stage == "pretrain"
    assert tasks["show"].stage == ""
    assert tasks["show"].is_optional("a")
    assert tasks["make"].parameters["text"].value == "word"


def test_a_container_is_told_what_kubeflow_tells(package, tmp_path):
    (task,) = (task for task in read_tasks(package) if task.name == "make")
    call = call_of(task, {"text": "two words", "number": 2}, tmp_path)
    assert call.command[:4] == ["vitpipe", "run", "pretrain", "--executor-input"]
    # No volume of a cluster is here: the state lies in the run's folder.
    assert call.command[-4:] == ["--state", str(tmp_path / ".make.state"), "--text", "two words"]
    assert call.environment == {"A": "b"}
    io = ExecutorIO(call.command[4])
    assert io.parameters() == {"text": "two words", "number": 2}
    assert isinstance(io.parameters()["number"], int)
    assert io.output_folder() == tmp_path / "make"
    assert outputs_of(task, call) == {}
    without = call_of(task, {"number": 2}, tmp_path)
    assert "--text" not in without.command
    assert ExecutorIO(without.command[4]).parameters() == {"number": 2}


class Containers:
    """Containers that note what they are told, and fail where they should."""

    def __init__(self, failing=()):
        self.calls, self.failing = {}, failing

    def log(self, task):
        return Path(f"{task}.log")

    def run(self, task, image, command, **settings):
        self.calls[task] = (command, settings)
        return Ended(1 if task in self.failing else 0)


def runner(package, tmp_path, containers, parameters):
    tasks = read_tasks(package)
    images = {task.image: "id" for task in tasks}
    return TaskRunner(
        tasks, parameters, tmp_path, containers, images, {"environment": {}}, False, True, print
    )


def test_what_shall_run_after_a_failure_runs(package, tmp_path):
    containers = Containers(failing=("make",))
    outcomes = runner(package, tmp_path, containers, {"word": "w", "place": "/w"}).run_all()
    assert {name: outcome.state for name, outcome in outcomes.items()} == {
        "importer": "done",
        "make": "failed",
        "show": "done",
        "end": "done",
    }
    told = json.loads(containers.calls["show"][0][1])
    # The missing input is left out, the imported one is there.
    assert list(told["inputs"]["artifacts"]) == ["b"]
    assert told["inputs"]["artifacts"]["b"]["artifacts"][0]["uri"] == "/w"
    words = containers.calls["end"][0]
    status = json.loads(words[words.index("--executor_input") + 1])["inputs"]["parameterValues"]["status"]
    assert status["state"] == "FAILED"
    assert "make" in status["error"]["message"]


def test_what_an_importer_names_is_mounted(package, tmp_path):
    tasks = read_tasks(package)
    assert imported_places(tasks, {"place": str(tmp_path)}) == [tmp_path]
    assert imported_places(tasks, {"place": "s3://bucket/weights"}) == []
    assert imported_places(tasks, {"place": str(tmp_path / "none")}) == []


def test_loops_and_conditions_are_refused(tmp_path):
    @dsl.pipeline(name="looping")
    def looping():
        with dsl.ParallelFor(["a", "b"]) as item:
            say(status=item)

    @dsl.pipeline(name="choosing")
    def choosing(word: str = "w"):
        with dsl.If(word == "w"):
            say(status="it is")

    for pipeline in (looping, choosing):
        path = tmp_path / "refused.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        with pytest.raises(InputError, match="is a loop or has a condition"):
            read_tasks(path)
