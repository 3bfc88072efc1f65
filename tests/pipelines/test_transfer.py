"""A pipeline that starts from a finished stage's output."""

from __future__ import annotations

import pytest
import yaml

from pipelines.compile import compile_pipeline
from pipelines.package import check_arguments, validate_package
from pipelines.transfer import stages_left
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import InputError

RECIPE, ADDRESS = "itpn/pixel_base", "s3://store/v2/artifacts/itpn/8d3f/pretrain/91ab/out"


def compiled(out, *overrides, **imported):
    return compile_pipeline(RECIPE, "demo", overrides, out, imported=imported)


def test_the_address_takes_the_place_of_the_task(tmp_path):
    package = compiled(tmp_path / "p.yaml", "seed=2", pretrain=ADDRESS)
    inputs = {task.stage: task.inputs for task in package.tasks}
    assert "pretrain" not in inputs
    for stage in ("intermediate", "probe", "detect", "segment"):
        assert inputs[stage]["weights"] == "importer"
    assert inputs["finetune"]["weights"] == "intermediate"
    assert inputs["report"]["pretrain"] == "importer"
    assert package.parameters["pretrain_address"] == ADDRESS
    assert "pretrain_overrides" not in package.parameters
    spec = yaml.safe_load(package.path.read_text(encoding="utf-8").split("\n---\n")[0])
    importer = spec["deploymentSpec"]["executors"]["exec-importer"]["importer"]
    assert importer["typeSchema"]["schemaTitle"] == "system.Model"
    assert importer["artifactUri"] == {"runtimeParameter": "uri"}
    # Another address is a matter of the run.
    check_arguments(validate_package(package.path), {"pretrain_address": "gs://other/out"})


@pytest.mark.parametrize(
    ("imported", "left"),
    [
        ("pretrain", "prepare pretrain intermediate finetune probe detect segment evaluate report"),
        ("intermediate", "prepare pretrain intermediate finetune probe detect segment evaluate report"),
        # Nothing takes the weights of `intermediate` but what is given.
        ("finetune", "prepare pretrain finetune probe detect segment evaluate report"),
    ],
)
def test_what_only_made_it_is_left_out(imported, left):
    assert " ".join(stages_left(load_recipe(RECIPE, "demo"), [imported])) == left


def test_a_chain_of_one_branch_keeps_its_end_only():
    recipe = load_recipe("paca/coco/tiny", "demo")
    assert stages_left(recipe, ["finetune"]) == ("prepare", "finetune", "detect", "report")
    short = load_recipe(RECIPE, "demo", ["stages=[prepare, pretrain, finetune, evaluate, report]"])
    assert stages_left(short, ["finetune"]) == ("prepare", "finetune", "evaluate", "report")


@pytest.mark.parametrize(
    ("stage", "address", "message"),
    [
        ("pretran", ADDRESS, "did you mean 'pretrain'"),
        ("detect", ADDRESS, "is no stage of this recipe that gives weights"),
        ("pretrain", "weights.safetensors", "is no address"),
        ("pretrain", "https://host/x", "is no address"),
        ("pretrain", "s3://me:hunter2@store/x", "contains credentials"),
        ("pretrain", "/$(HOME)/x", r"contains \$\("),
    ],
)
def test_what_cannot_take_its_place(tmp_path, stage, address, message):
    with pytest.raises(InputError, match=message) as caught:
        compiled(tmp_path / "p.yaml", **{stage: address})
    assert "hunter2" not in str(caught.value)
    assert not list(tmp_path.iterdir())
