"""The components against the graph: same names, inputs, kinds, image, command."""

from __future__ import annotations

import pytest

from components.stage_component import components
from vitpipe.contracts.graph import all_stages

COMPONENTS, BY_NAME = components(), all_stages()
STAGES = tuple(BY_NAME.values())

KIND = {
    "Dataset": "system.Dataset",
    "Model": "system.Model",
    "Artifact": "system.Artifact",
}
PARAMETERS = {
    "recipe",
    "profile",
    "recipe_values",
    "overrides",
    "fixed_overrides",
    "code_digest",
    "data_digest",
}


def schema(spec) -> str:
    return spec.type.partition("@")[0]


def artifacts(specs) -> dict:
    return {name: spec for name, spec in (specs or {}).items() if "@" in spec.type}


def test_there_is_one_component_per_stage():
    assert list(COMPONENTS) == [stage.name for stage in STAGES]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_inputs_are_the_graphs(stage):
    spec = COMPONENTS[stage.name].component_spec
    found = artifacts(spec.inputs)
    assert set(found) == set(stage.inputs)
    for name, feeders in stage.inputs.items():
        assert {KIND[BY_NAME[feeder].kind] for feeder in feeders} == {schema(found[name])}
        assert found[name].optional == (feeders != ("prepare",)), (
            f"only the data are always there, not {name}"
        )
    assert set(spec.inputs) - set(found) == PARAMETERS


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_outputs_are_the_folder_and_its_metrics(stage):
    found = {name: schema(spec) for name, spec in COMPONENTS[stage.name].component_spec.outputs.items()}
    page = {
        "report": {"report": "system.HTML", "verdict": "system.Markdown"},
        "evaluate": {"confusion": "system.ClassificationMetrics"},
    }.get(stage.name, {})
    assert found == {"out": KIND[stage.kind], "metrics": "system.Metrics", **page}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_command_is_the_one_that_dvc_calls(stage):
    container = COMPONENTS[stage.name].component_spec.implementation.container
    assert container.command == ["vitpipe", "run", stage.name]
    assert container.args[::2] == ["--recipe", "--profile", "--executor-input"]
    assert container.args[-1] == "{{$}}"
    assert container.image == f"vitpipe-{stage.image}"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_component_says_what_it_does(stage):
    assert COMPONENTS[stage.name].component_spec.description
