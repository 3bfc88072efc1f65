"""Which tasks Kubeflow would run again: a model of the key by which its driver finds a cached result.

The key holds the names of input artifacts, the values of input parameters, the outputs' types, image, command,
environment and claims (kubeflow/pipelines, backend/src/v2/cacheutils). An artifact's name is that of the run
that made it, so a task that runs again gives new names to all behind it.
"""

from __future__ import annotations

import hashlib
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.compile import compile_pipeline
from pipelines.lint import leaf_tasks
from vitpipe.config.pipeline_parameters import parameter_of, split_overrides, upstream_of
from vitpipe.config.read import load_recipe
from vitpipe.contracts.graph import graph_of
from vitpipe.stages.pipeline_run import CONCLUSION

RECIPE = "itpn/pixel_base"


@pytest.fixture(scope="module")
def nodes():
    recipe = load_recipe(RECIPE, "demo")
    return graph_of(recipe.stages, recipe.start_from)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "p.yaml"
    compile_pipeline(RECIPE, "demo", [], path)
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def cache_keys(documents, arguments) -> dict[str, str]:
    """Task -> its key, for a run with these arguments."""
    spec, platform = documents
    claims = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    defaults = {
        name: entry.get("defaultValue")
        for name, entry in spec["root"]["inputDefinitions"]["parameters"].items()
    }
    values, keys = {**defaults, **arguments}, {}
    # The task at the end is never cached.
    tasks = {name: task for name, task, _ in leaf_tasks(spec) if name != CONCLUSION}

    def key(name: str) -> str:
        if name in keys:
            return keys[name]
        task = tasks[name]
        component = spec["components"][task["componentRef"]["name"]]
        container = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        inputs = task["inputs"]
        parts = {
            "artifacts": {
                k: key(v["taskOutputArtifact"]["producerTask"])
                for k, v in inputs.get("artifacts", {}).items()
            },
            "parameters": {
                k: v["runtimeValue"]["constant"]
                if "runtimeValue" in v
                else values[v["componentInputParameter"].removeprefix("pipelinechannel--")]
                for k, v in inputs["parameters"].items()
            },
            "outputs": component["outputDefinitions"],
            "container": {k: container.get(k) for k in ("image", "command", "args", "env")},
            "claims": claims[component["executorLabel"]].get("pvcMount"),
        }
        text = json.dumps(parts, sort_keys=True)
        keys[name] = hashlib.sha256(text.encode()).hexdigest()
        return keys[name]

    return {name: key(name) for name in tasks}


def run_again(documents, arguments) -> set[str]:
    before, after = cache_keys(documents, {}), cache_keys(documents, arguments)
    return {name for name in before if before[name] != after[name]}


def test_an_override_of_a_stage_runs_it_and_what_follows_again_and_nothing_else(compiled, nodes):
    upstream = upstream_of(nodes)
    table = {}
    for node in nodes:
        again = run_again(compiled, {parameter_of(node.name): [f"{node.name}.note=1"]})
        assert again == {name for name, before in upstream.items() if node.name in before}
        table[node.name] = sorted(again)
    assert table["finetune"] == ["evaluate", "finetune", "report"]
    assert table["detect"] == ["detect", "report"]
    assert len(table["prepare"]) == len(nodes)


@pytest.mark.parametrize("arguments", [{"overrides": ["seed=3"]}, {"data_digest": "2026-11-30"}])
def test_what_concerns_all_runs_everything_again(compiled, nodes, arguments):
    assert run_again(compiled, arguments) == {node.name for node in nodes}


def test_the_same_arguments_run_nothing_again(compiled):
    assert run_again(compiled, {"overrides": [], "probe_overrides": []}) == set()


TEXTS = [
    "seed=1",
    "data.root=/d",
    "pretrain.epochs=1",
    "finetune.epochs=2",
    "video.size=1",
    "stages=[report]",
]


@given(st.lists(st.sampled_from(TEXTS)))
def test_every_override_goes_to_one_parameter_in_its_order(overrides):
    split = split_overrides(overrides, ["prepare", "pretrain", "finetune"])
    assert split["finetune_overrides"] == [o for o in overrides if o.startswith("finetune")]
    assert split["pretrain_overrides"] == [o for o in overrides if o.startswith("pretrain")]
    assert split["prepare_overrides"] == []
    # The graph is carried with the recipe; the section of a stage that is not there does nothing.
    assert split["overrides"] == [o for o in overrides if o.split(".")[0] in ("seed=1", "data", "video")]
