"""The rows of a published table as one package: one task per piece of work, each with its own recipe and seed."""

from __future__ import annotations

import pytest
import yaml

from pipelines.local import run_locally
from pipelines.package import validate_package
from pipelines.package_tasks import read_tasks
from pipelines.table import compile_table, table_pipeline_name
from pipelines.verbs import _compile_table
from vitpipe.contracts.errors import InputError
from vitpipe.tables.table_plan import plan_table

BASE, LARGE = "revcolv2/base", "revcolv2/large"


@pytest.fixture(scope="module")
def plan():
    """Two recipes at two seeds, up to the linear probe."""
    return planned("full")


def planned(profile: str):
    chosen = ["metric=linear_probe_top1"]
    overrides = ["data.workers=0", "data.root=/data"]
    return plan_table("revcolv2", "5", profile, num_seeds=2, conditions=chosen, overrides=overrides)


@pytest.fixture(scope="module")
def package(plan, tmp_path_factory):
    return compile_table(plan, tmp_path_factory.mktemp("table") / "table.yaml")


def task(package, name: str) -> dict:
    document = next(yaml.safe_load_all(package.path.read_text(encoding="utf-8")))
    every = document["root"]["dag"]["tasks"]
    group = every["exit-handler-1"]["componentRef"]["name"]
    return {**every, **document["components"][group]["dag"]["tasks"]}[name]


def constant(found: dict, name: str):
    return found["inputs"]["parameters"][name]["runtimeValue"]["constant"]


def test_a_stage_that_runs_share_is_one_task(package):
    # The recipes prepare the same sets, once for both seeds; nothing else is the same work.
    counts = {stage: package.stages.count(stage) for stage in package.stages}
    assert counts == {"prepare": 1, "pretrain": 4, "probe": 4}
    assert package.name == "table-revcolv2-5-full"
    readers = [item.stage for item in package.tasks if item.inputs.get("data") == "prepare"]
    assert sorted(readers) == ["pretrain"] * 4 + ["probe"] * 4


def test_recipes_that_say_the_same_share_their_work(tmp_path):
    # At demo size both have the same nano network and the same settings up to the probe.
    package = compile_table(planned("demo"), tmp_path / "table.yaml")
    counts = {stage: package.stages.count(stage) for stage in package.stages}
    assert counts == {"prepare": 1, "pretrain": 2, "probe": 2}


def test_every_task_has_its_recipe_and_its_seed(package):
    found = {(constant(task(package, name), "recipe"), tuple(constant(task(package, name), "fixed_overrides")))
             for name in ("probe", "probe-2", "probe-3", "probe-4")}  # fmt: skip
    assert found == {(BASE, ()), (BASE, ("seed=1",)), (LARGE, ()), (LARGE, ("seed=1",))}
    # The data are prepared at the recipe's own seed.
    assert constant(task(package, "prepare"), "fixed_overrides") == []


def test_a_task_reads_the_weights_of_its_own_run(package):
    for item in package.tasks:
        if item.stage == "probe":
            own, feeder = task(package, item.name), task(package, item.inputs["weights"])
            assert constant(own, "recipe") == constant(feeder, "recipe")
            assert constant(own, "fixed_overrides") == constant(feeder, "fixed_overrides")


def test_overrides_are_a_parameter_and_the_code_is_in_the_cache_key(package, plan):
    assert package.parameters == {
        "overrides": ["data.workers=0", "data.root=/data"],
        "data_digest": "",
    }
    assert (
        constant(task(package, "probe"), "code_digest")
        == plan.runs[0].stages["probe"].identity["code_digest"]
    )


def test_the_last_task_compares_whatever_became_of_the_runs(package, plan):
    found = task(package, "compare-table")
    assert found["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert found["dependentTasks"] == ["exit-handler-1"]
    given = found["inputs"]["parameters"]
    assert given["overrides"] == {"componentInputParameter": "overrides"}
    assert (constant(found, "seeds"), constant(found, "rows")) == (2, ["metric=linear_probe_top1"])
    (command,) = (item.words for item in read_tasks(package.path) if item.name == "compare-table")
    assert command[:2] == ["vitpipe", "compare-table"]
    assert command[-2:] == ["--table", "revcolv2/5"]
    # It runs in every case, so the cache must not answer for it.
    assert not found["cachingOptions"]


def test_the_local_runner_and_wrong_files_are_refused(package, plan, tmp_path):
    with pytest.raises(InputError, match="several runs"):
        run_locally(package.path, root=tmp_path)
    with pytest.raises(InputError, match=r"ends in \.yaml"):
        compile_table(plan, tmp_path / "table.json")
    own = tmp_path / "own.yaml"
    own.write_text("mine: 1\n")
    with pytest.raises(InputError, match="not a pipeline package"):
        compile_table(plan, own)
    assert own.read_text() == "mine: 1\n"


def test_the_verb_writes_below_build(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _compile_table(plan)
    assert path.as_posix() == f"build/{table_pipeline_name(plan)}.yaml"
    assert validate_package(path).stages.count("probe") == 4
