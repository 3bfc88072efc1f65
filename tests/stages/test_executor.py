"""Kubeflow's messages: where artifacts lie, what is written when, and that kfp's own types can read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kfp.pipeline_spec import pipeline_spec_pb2

from vitpipe.config.digest import file_digest
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import (
    CARD,
    METRICS,
    Card,
    RunRecord,
    write_card,
    write_metrics,
    write_table,
    writing,
)
from vitpipe.contracts.errors import ArtifactError, InputError
from vitpipe.contracts.graph import all_stages
from vitpipe.stages.executor import ExecutorIO, confusion_matrix, local_path
from vitpipe.stages.pipeline_run import PipelineRun
from vitpipe.stages.run import identity_of

METRIC_VALUES = {"top1": 0.5, "loss": 1.25}


def message(root: Path, outputs=("out", "metrics"), inputs=(), **parameters) -> str:
    """An ExecutorInput as kfp's local runner writes it, made from the protocol's own type."""
    spec = pipeline_spec_pb2.ExecutorInput()
    for name, value in parameters.items():
        json_format.ParseDict(value, spec.inputs.parameter_values[name])
    for name in inputs:
        spec.inputs.artifacts[name].artifacts.add(name="out", uri=str(root / "upstream" / name / "out"))
    for name in outputs:
        spec.outputs.artifacts[name].artifacts.add(name=name, uri=str(root / "task" / name))
    spec.outputs.output_file = str(root / "task" / "executor_output.json")
    return json.dumps(json_format.MessageToDict(spec))


def finished_folder(out: Path, metrics=METRIC_VALUES, stage="finetune", files=()) -> Card:
    card = Card(
        stage=stage, recipe="itpn/pixel_base", profile="demo", recipe_digest="r", data_digest="d",
        code_digest="c", image="train", identity="i", parents={}, seed=3, libraries={},
    )  # fmt: skip
    with writing(out) as folder:
        write_metrics(folder, metrics)
        write_card(
            folder, card, RunRecord(git_commit="g", started_at="2026-01-01T00:00:00", wall_seconds=2.5)
        )
        for name in files:
            (folder / name).write_text("page", encoding="utf-8")
    return card


def written(root: Path) -> pipeline_spec_pb2.ExecutorOutput:
    """executor_output.json through the protocol's own type, which refuses unknown fields."""
    text = (root / "task" / "executor_output.json").read_text(encoding="utf-8")
    return json_format.Parse(text, pipeline_spec_pb2.ExecutorOutput())


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        # As Kubeflow stores it, as its local runner does, and a table's second task of a stage.
        ("s3://store/v2/artifacts/itpn/8d3f/finetune/91ab/out", "s3://store/v2/artifacts/itpn/8d3f"),
        ("/root/itpn-2026-11-29/finetune/out", "/root/itpn-2026-11-29"),
        ("s3://finetune-models/v2/itpn/8d3f/finetune-2/91ab/out", "s3://finetune-models/v2/itpn/8d3f"),
        ("s3://store/odd/out", ""),
    ],
)
def test_tasks_of_one_pipeline_run_have_one_folder(tmp_path, uri, folder):
    values = json.loads(message(tmp_path))
    values["outputs"]["artifacts"]["out"]["artifacts"][0]["uri"] = uri
    assert ExecutorIO(json.dumps(values)).pipeline_run("finetune") == PipelineRun(folder)


@pytest.mark.parametrize(
    ("artifact", "path"),
    [
        ({"uri": "/runs/a/out"}, "/runs/a/out"),
        ({"uri": "gs://bucket/a/out"}, "/gcs/bucket/a/out"),
        ({"uri": "s3://bucket/a/out"}, "/s3/bucket/a/out"),
        ({"uri": "minio://mlpipeline/a/out"}, "/minio/mlpipeline/a/out"),
        ({"uri": "oci://host/repo/model:1"}, "/oci/host_repo_model:1"),
        ({"uri": "s3://b/a", "customPath": "/data/here"}, "/data/here"),
        (
            {"uri": "s3://b/a", "metadata": {"_kfp_workspace": True}},
            "/kfp-workspace/.artifacts/s3/b/a",
        ),
        ({"uri": "/a", "metadata": {"_kfp_workspace": "yes"}}, "/a"),
    ],
)
def test_an_artifact_lies_where_its_launcher_puts_it(artifact, path):
    assert local_path(artifact) == Path(path)


def test_inputs_are_those_that_were_given(tmp_path):
    raw = json.loads(message(tmp_path, inputs=("data",)))
    raw["inputs"]["artifacts"]["weights"] = {}
    io = ExecutorIO(json.dumps(raw))
    assert io.inputs() == {"data": tmp_path / "upstream" / "data" / "out"}


def test_a_stage_without_inputs(tmp_path):
    io = ExecutorIO(message(tmp_path))
    assert io.inputs() == {}
    assert io.parameters() == {}
    assert io.overrides() == ()


def test_overrides_of_the_run_come_after_those_of_the_stage(tmp_path):
    text = message(tmp_path, overrides=["seed=1"], finetune_overrides=["finetune.epochs=2"])
    assert ExecutorIO(text).overrides() == ("finetune.epochs=2", "seed=1")


@pytest.mark.parametrize("wrong", ["seed=1", [1], {"seed": 1}])
def test_overrides_that_are_no_list_of_texts(tmp_path, wrong):
    with pytest.raises(InputError, match="'overrides' is not a list of texts"):
        ExecutorIO(message(tmp_path, overrides=wrong)).overrides()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{{$}}",
        "[]",
        "3",
        "{}",
        '{"outputs": {"outputFile": "/x"}}',
        '{"outputs": {"artifacts": {"out": {}}}}',
        '{"inputs": {"parameterValues": null}, "outputs": {"outputFile": "/x", "artifacts": {"out": {}}}}',
    ],
)
def test_what_is_no_executor_input(text):
    with pytest.raises(InputError, match="cannot be read") as caught:
        ExecutorIO(text)
    assert caught.value.exit_code == 2


def test_the_output_folder_gets_a_parent_and_loses_an_old_receipt(tmp_path):
    io = ExecutorIO(message(tmp_path))
    receipt = tmp_path / "task" / "executor_output.json"
    receipt.parent.mkdir()
    receipt.write_text("{}", encoding="utf-8")
    assert io.output_folder() == tmp_path / "task" / "out"
    assert io.output_folder().parent.is_dir()
    assert not io.output_folder().exists()
    assert not receipt.exists()


def test_finish_writes_metadata_metrics_and_receipt(tmp_path):
    io = ExecutorIO(message(tmp_path))
    out = io.output_folder()
    card = finished_folder(out)
    io.finish(METRIC_VALUES, {"note": "mine"})

    found = written(tmp_path)
    metadata = json_format.MessageToDict(found.artifacts["out"].artifacts[0].metadata)
    assert metadata["receipt"] == file_digest(out / CARD)
    assert metadata["note"] == "mine"
    for key in (
        "stage",
        "recipe",
        "profile",
        "recipe_digest",
        "code_digest",
        "data_digest",
        "identity",
        "seed",
    ):
        assert metadata[key] == getattr(card, key)
    assert json_format.MessageToDict(found.artifacts["metrics"].artifacts[0].metadata) == METRIC_VALUES
    assert (tmp_path / "task" / "metrics").read_bytes() == (out / METRICS).read_bytes()
    assert found.artifacts["out"].artifacts[0].uri == str(out)
    assert not list((tmp_path / "task").glob(".*"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.text(min_size=1, max_size=20), st.floats(allow_nan=True, allow_infinity=True))
)
def test_kfp_reads_back_every_finite_metric(tmp_path, values):
    io = ExecutorIO(message(tmp_path))
    finished_folder(io.output_folder())
    io.finish(values)
    found = json_format.MessageToDict(written(tmp_path).artifacts["metrics"].artifacts[0].metadata)
    assert found == {k: v for k, v in values.items() if abs(v) < float("inf")}


def test_a_further_output_is_a_file_of_the_folder(tmp_path):
    io = ExecutorIO(message(tmp_path, outputs=("out", "metrics", "report")))
    finished_folder(io.output_folder(), stage="report", files=("report.html",))
    io.finish({})
    assert (tmp_path / "task" / "report").read_text(encoding="utf-8") == "page"
    assert "report" in written(tmp_path).artifacts


def matrix_tables(num_classes: int) -> dict[str, list[dict[str, object]]]:
    names = [f"class {i}" for i in range(num_classes)]
    return {
        "per_class": [{"class": name, "images": 3} for name in names],
        "confusion": [
            {"true": names[0], "predicted": names[0], "images": 2},
            {"true": names[0], "predicted": names[-1], "images": 1},
        ],
    }


def test_the_confusion_matrix_is_drawn_on_kubeflow_s_page(tmp_path):
    """As `ClassificationMetrics.log_confusion_matrix` of kfp's SDK writes it."""
    from kfp.dsl import ClassificationMetrics

    out = tmp_path / "task" / "out"
    with writing(out) as folder:
        card = finished_folder(tmp_path / "other")
        write_metrics(folder, METRIC_VALUES)
        for name, rows in matrix_tables(3).items():
            write_table(folder, name, rows)
        write_card(
            folder, card, RunRecord(git_commit="g", started_at="2026-01-01T00:00:00", wall_seconds=2.5)
        )
    io = ExecutorIO(message(tmp_path, outputs=("out", "metrics", "confusion")))
    io.finish(METRIC_VALUES)
    artifact = written(tmp_path).artifacts["confusion"].artifacts[0]
    expected = ClassificationMetrics(metadata={})
    expected.log_confusion_matrix([f"class {i}" for i in range(3)], [[2, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert json_format.MessageToDict(artifact.metadata) == expected.metadata
    assert (tmp_path / "task" / "confusion").read_bytes() == (out / "tables" / "confusion.csv").read_bytes()


@pytest.mark.parametrize("tables", [{}, {"per_class": []}, matrix_tables(51)])
def test_no_matrix_or_one_too_large_to_draw(tables):
    assert confusion_matrix(tables) == {}


def test_a_missing_file_output_leaves_no_receipt(tmp_path):
    io = ExecutorIO(message(tmp_path, outputs=("out", "metrics", "report")))
    finished_folder(io.output_folder(), stage="report")
    with pytest.raises(ArtifactError, match="no file for its output 'report'"):
        io.finish({})
    assert not (tmp_path / "task" / "executor_output.json").exists()


def test_an_unfinished_folder_leaves_no_receipt(tmp_path):
    io = ExecutorIO(message(tmp_path))
    io.output_folder().mkdir()
    with pytest.raises(ArtifactError):
        io.finish(METRIC_VALUES)
    assert not (tmp_path / "task" / "executor_output.json").exists()


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    text = message(tmp_path)
    finished_folder(tmp_path / "task" / "out")
    receipt = tmp_path / "task" / "executor_output.json"
    receipt.write_text("of rank 0", encoding="utf-8")
    monkeypatch.setenv("RANK", "1")
    io = ExecutorIO(text)
    io.output_folder()
    io.finish(METRIC_VALUES)
    assert receipt.read_text(encoding="utf-8") == "of rank 0"


def test_other_code_than_compiled_is_refused(tmp_path):
    recipe = load_recipe("itpn/pixel_base", "demo")
    own = identity_of(recipe, all_stages()["probe"])["code_digest"]
    ExecutorIO(message(tmp_path, code_digest=own)).check_code(recipe, "probe")
    ExecutorIO(message(tmp_path)).check_code(recipe, "probe")
    with pytest.raises(ArtifactError, match="other code than the pipeline was compiled from"):
        ExecutorIO(message(tmp_path, code_digest="0" * 64)).check_code(recipe, "probe")


def test_the_same_task_with_other_places(tmp_path):
    """A job on several nodes gets it: parameters, addresses and the run stay, folders are those on its claim."""
    values = json.loads(
        message(tmp_path, outputs=("out", "metrics", "report"), inputs=("data",), overrides=["seed=3"])
    )
    run = "s3://store/v2/artifacts/itpn/8d3f"
    values["outputs"]["artifacts"]["out"]["artifacts"][0]["uri"] = f"{run}/finetune/91ab/out"
    values["inputs"]["artifacts"]["data"]["artifacts"][0]["metadata"] = {"_kfp_workspace": True}
    first = ExecutorIO(json.dumps(values))
    claim = tmp_path / "claim"
    text = first.moved_to({"data": claim / "in" / "data"}, claim)
    json_format.Parse(text, pipeline_spec_pb2.ExecutorInput())  # refuses unknown fields
    moved = ExecutorIO(text)
    assert moved.inputs() == {"data": claim / "in" / "data"}
    assert moved.output_folder() == claim / "out"
    assert moved.overrides() == first.overrides() == ("seed=3",)
    assert moved.pipeline_run("finetune") == first.pipeline_run("finetune")
    assert moved.pipeline_run("finetune").folder == run
    finished_folder(claim / "out")
    moved.finish(METRIC_VALUES)
    assert json.loads((claim / "executor_output.json").read_text())["artifacts"].keys() == {"out"}
    # The launcher retried makes the same text: the job's specification must not differ.
    assert first.moved_to({"data": claim / "in" / "data"}, claim) == text
