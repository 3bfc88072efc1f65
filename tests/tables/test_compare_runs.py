"""The last task of a table's pipeline, on records of stages as they lie on a cluster's volume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitpipe.cli import app
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import CARD, open_artifact
from vitpipe.contracts.errors import InputError
from vitpipe.stages.executor import ExecutorIO
from vitpipe.stages.pipeline_run import PipelineRun
from vitpipe.stages.run_records import all_records, keep_record
from vitpipe.tables.compare_runs import compare
from vitpipe.tables.recorded_stages import RecordedStages
from vitpipe.tables.table_plan import FinishedStages, plan_table

SUCCEEDED = {"state": "SUCCEEDED"}
RUN = PipelineRun("minio://mlpipeline/table-toy-1-size/8d3f")


def message(folder: Path, **parameters) -> str:
    """The executor input of the task, whose outputs lie in `folder`."""

    def artifact(name: str, kind: str) -> dict:
        uri = f"{RUN.folder}/compare-table/{name}"
        schema = {"schemaTitle": f"system.{kind}"}
        return {"artifacts": [{"name": name, "uri": uri, "customPath": str(folder / name), "type": schema}]}

    kinds = {"out": "Artifact", "table": "HTML", "rows_beside_published": "Markdown", "metrics": "Metrics"}
    return json.dumps(
        {
            "inputs": {"parameterValues": parameters},
            "outputs": {
                "artifacts": {name: artifact(name, kind) for name, kind in kinds.items()},
                "outputFile": str(folder / "executor_output.json"),
            },
        }
    )


@pytest.fixture
def volume(toy, fake, tmp_path) -> Path:
    """States with the records of two variants at two seeds, whose outputs lie nowhere else."""
    done = CliRunner().invoke(app, ["table", "toy/1", "--run", "--profile", "size", "--seeds", "2"])
    assert done.exit_code == 0, done.output
    shutil.copytree("artifacts/tables/toy-1/size", tmp_path / "written here")
    for card in Path("artifacts").rglob(CARD):
        keep_record(tmp_path / "states", RUN, open_artifact(card.parent))
    shutil.rmtree("artifacts")
    return tmp_path / "states"


def compared(volume: Path, folder: Path, **parameters) -> tuple[list[str], dict]:
    said: list[str] = []
    given = {"seeds": 2.0, "rows": [], "overrides": [], "status": SUCCEEDED, **parameters}
    compare(ExecutorIO(message(folder, **given)), "toy/1", "size", volume, said.append)
    return said, json.loads((folder / "executor_output.json").read_text(encoding="utf-8"))


def test_it_is_the_table_that_the_same_runs_give_here(volume, tmp_path):
    said, output = compared(volume, tmp_path / "pod")
    here = tmp_path / "written here"
    for name in ("table.csv", "table.md"):
        text, expected = ((place / name).read_text("utf-8") for place in (tmp_path / "pod" / "out", here))
        # Only the folders of the runs differ, in the list behind the table.
        assert text.partition("## Runs")[0] == expected.partition("## Runs")[0]
    assert (tmp_path / "pod" / "table").read_bytes() == (tmp_path / "pod" / "out" / "table.html").read_bytes()
    assert any("plain" in line and "60" in line for line in said)
    numbers = output["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert sum(numbers.values()) == 4.0  # the rows of the table


def test_rows_of_failed_runs_say_why_and_the_others_stand(volume, tmp_path):
    for record in volume.glob("runs/8d3f/finetune-*"):
        artifact = open_artifact(record)
        if artifact.card.seed == 1 and "smooth" in artifact.card.recipe:
            shutil.rmtree(record)
    failed = {"state": "FAILED", "error": {"message": "pod finetune-4 was evicted"}}
    said, _ = compared(volume, tmp_path / "pod", status=failed)
    assert "The run has failed: pod finetune-4 was evicted" in said
    text = (tmp_path / "pod" / "out" / "table.md").read_text("utf-8")
    assert "toy/cells/smooth, seed 1, stage finetune: it has left no result" in text
    rows = (tmp_path / "pod" / "out" / "table.csv").read_text("utf-8")
    assert "seed 1: stage finetune failed" in rows
    (smooth,) = [line for line in text.splitlines() if line.startswith("| toy, smooth |")]
    assert "| 70 % | 1 |" in smooth  # of the seed that has finished
    (plain,) = [line for line in text.splitlines() if line.startswith("| toy, plain | top1")]
    assert "| 60.50 ± 0.71 % | 2 |" in plain


def test_what_nobody_knows_of_is_not_called_failed(volume, tmp_path):
    for record in volume.glob("runs/8d3f/finetune-*"):
        shutil.rmtree(record)
    said, _ = compared(volume, tmp_path / "cached")  # Kubeflow says that all has succeeded
    assert any("took these from its cache" in line and "toy/cells/plain, seed 0" in line for line in said)
    assert "failed" not in (tmp_path / "cached" / "out" / "table.md").read_text("utf-8")
    shutil.rmtree(volume)
    failed = {"state": "FAILED", "error": {"message": "pod prepare was evicted"}}
    for states, why in ((volume, ""), (None, "claims.state")):
        folder = tmp_path / f"empty {states is None}"
        said, output = compared(states, folder, status=failed)
        assert output == {}
        assert said[-1].startswith("There are no results of stages to compare.")
        assert why in (folder / "rows_beside_published").read_text("utf-8")
        assert not (folder / "out").exists()


def test_records_of_other_values_or_inputs_are_not_taken(volume, tmp_path):
    plan = plan_table("toy", "1", "size", num_seeds=2)
    found = RecordedStages(all_records(volume, RUN))
    run = plan.runs[0]
    assert {stage: found.folder(run, stage) is not None for stage in run.stages} == dict.fromkeys(
        run.stages, True
    )
    assert FinishedStages(plan.runs).folder(run, "finetune") is None  # nothing lies here any more
    other = plan_table("toy", "1", "size", num_seeds=2, overrides=["finetune.epochs=7"]).runs[0]
    kept = {stage: found.folder(other, stage) is not None for stage in other.stages}
    assert kept["pretrain"]
    assert not kept["finetune"]
    # Another run of the pipeline has left nothing, but may have taken all this from Kubeflow's cache.
    second = PipelineRun("minio://mlpipeline/table-toy-1-size/other")
    assert all_records(volume, second) == []
    assert len(all_records(volume, second, of_all_runs=True)) == len(all_records(volume, RUN))


def test_what_other_code_has_made_is_not_taken(volume, tmp_path):
    run = plan_table("toy", "1", "size", num_seeds=2).runs[0]
    for record in all_records(volume, RUN):
        if record.card.stage == "finetune":
            text = (record.path / CARD).read_text("utf-8")
            (record.path / CARD).write_text(text.replace(record.card.code_digest, "0" * 64))
    found = RecordedStages(all_records(volume, RUN))
    assert found.folder(run, "pretrain") is not None
    assert found.folder(run, "finetune") is None


def test_weights_of_another_pre_training_do_not_count(volume, tmp_path):
    plan = plan_table("toy", "1", "size", num_seeds=2)
    run = plan.runs[0]
    for record in all_records(volume, RUN):
        if record.card.stage == "pretrain" and record.card.seed == run.recipe.seed:
            text = (record.path / CARD).read_text("utf-8")
            (record.path / CARD).write_text(text.replace(record.card.data_digest, "0" * 64))
    found = RecordedStages(all_records(volume, RUN))
    assert found.folder(run, "prepare") is not None
    assert found.folder(run, "finetune") is None


def test_more_seeds_than_anybody_runs_are_refused_at_once(volume, tmp_path):
    with pytest.raises(InputError, match="too many"):
        compared(volume, tmp_path / "pod", seeds=1e30)
    for verb in (["table", "toy/1", "--run", "--profile", "size"], ["references", "--plan"]):
        done = CliRunner().invoke(app, [*verb, "--seeds", "1000000000"])
        assert isinstance(done.exception, InputError)


@pytest.mark.parametrize("seeds", [0, 1.5, "2", True, None])
def test_a_damaged_number_of_seeds_is_refused(volume, tmp_path, seeds):
    with pytest.raises(InputError, match="not a number of runs"):
        compared(volume, tmp_path / "pod", seeds=seeds)


def test_the_verb_takes_what_the_package_gives(volume, tmp_path):
    text = message(tmp_path / "pod", seeds=2, rows=["variant=plain"], overrides=[], status=SUCCEEDED)
    arguments = ["compare-table", "--profile", "size", "--executor-input", text, "--table", "toy/1"]
    done = CliRunner().invoke(app, arguments, env={"VITPIPE_STATES": str(volume)})
    assert done.exit_code == 0, done.output
    assert (tmp_path / "pod" / "table").read_text("utf-8").startswith("<!")
    unknown = [*arguments[:-1], "toy/99"]
    refused = CliRunner().invoke(app, unknown, env={"VITPIPE_STATES": str(volume)})
    assert refused.exit_code != 0
    assert load_recipe("toy/cells/plain", "size").stages
