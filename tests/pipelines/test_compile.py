"""The compiled package: strict reading, the graph in it, what decides a task's cache, what a node needs."""

from __future__ import annotations

import copy
import re

import pytest
import yaml
from recipe_samples import SAMPLED_RECIPES

from pipelines.compile import compile_pipeline
from pipelines.lint import leaf_tasks
from pipelines.package import check_arguments, validate_package
from pipelines.placement import Placement
from vitpipe.config.read import load_recipe, profile_names
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.contracts.graph import all_stages, graph_of
from vitpipe.stages.pipeline_run import CONCLUSION
from vitpipe.stages.run import identity_of

RECIPE, PROFILE = "itpn/pixel_base", "demo"
PLACEMENT = Placement(
    pools={
        "gpu": {
            "node_selector": {"accelerator": "a100"},
            "tolerations": ({"key": "gpu", "effect": "NoSchedule"},),
        }
    },
    claims={"data": {"name": "sets", "path": "/data"}},
)


def documents(path) -> list[dict]:
    return [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d]


def tasks(path) -> dict[str, dict]:
    return of(documents(path)[0])


def of(spec: dict) -> dict[str, dict]:
    """The tasks of a package that are run, by name."""
    return {name: task for name, task, _ in leaf_tasks(spec)}


def parameters(task: dict) -> dict:
    return task["inputs"]["parameters"]


def constant(task: dict, name: str):
    return parameters(task)[name]["runtimeValue"]["constant"]


def test_the_tasks_are_the_recipes_graph(package):
    nodes = graph_of(load_recipe(RECIPE, PROFILE).stages)
    assert package.stages == tuple(node.name for node in nodes)
    assert {t.stage: t.inputs for t in package.tasks} == {n.name: n.inputs for n in nodes}
    assert package.name == "itpn-pixel-base-demo"


def test_overrides_are_parameters_of_the_run_and_the_recipe_is_fixed(package):
    given = {f"{stage}_overrides": [] for stage in package.stages}
    given |= {"overrides": ["seed=2"], "finetune_overrides": ["finetune.epochs=3"], "data_digest": ""}
    assert package.parameters == given
    for task in tasks(package.path).values():
        assert (constant(task, "recipe"), constant(task, "profile")) == (RECIPE, PROFILE)
    check_arguments(package, {"overrides": []})
    with pytest.raises(InputError, match="no parameter 'epochs'"):
        check_arguments(package, {"epochs": 3})


@pytest.mark.parametrize(
    ("arguments", "message", "fix"),
    [
        ({"overrides": ["finetune.epochs=4"]}, "makes every task run again", "'finetune_overrides'"),
        ({"finetune_overrides": ["pretrain.epochs=4"]}, "does not belong to", "'pretrain_overrides'"),
        ({"finetune_overrides": ["seed=4"]}, "does not belong to the stage finetune", "'overrides'"),
        ({"finetune_overrides": None}, "has no value", "finetune_overrides="),
        ({"probe_overrides": "probe.epochs=1"}, "is not a list of texts", r"probe_overrides=\[probe\."),
    ],
)
def test_an_override_in_another_parameter_is_refused(package, arguments, message, fix):
    with pytest.raises(InputError, match=message) as caught:
        check_arguments(package, arguments)
    assert re.search(fix, caught.value.fix)


def test_every_task_carries_the_digest_of_its_code(package):
    recipe = load_recipe(RECIPE, PROFILE)
    for name, task in tasks(package.path).items():
        stage = all_stages()["report" if name == CONCLUSION else name]
        assert constant(task, "code_digest") == identity_of(recipe, stage)["code_digest"]
        (source,) = parameters(task)["data_digest"].values()
        assert source.removeprefix("pipelinechannel--") == "data_digest"


def test_commands_are_lists_of_arguments_that_no_shell_reads(package):
    executors = documents(package.path)[0]["deploymentSpec"]["executors"]
    assert len(executors) == len(package.tasks) + 1
    for name, executor in executors.items():
        container = executor["container"]
        assert container["command"][:2] == ["vitpipe", CONCLUSION if CONCLUSION in name else "run"]
        words = [*container["command"], *container["args"]]
        assert not {"sh", "bash", "/bin/sh", "-c"} & set(words)
        assert container["args"][1::2] == [
            "{{$.inputs.parameters['recipe']}}",
            "{{$.inputs.parameters['profile']}}",
            "{{$}}",
        ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.pinned.repo=https://me:hunter2@host/a.git",
            r"The address of data\.pinned\.repo contains credentials.*GIT_CONFIG_GLOBAL",
        ),
        ("data.pinned.repo=https://me:hun'hunter2@host/a.git", r"data\.pinned\.repo contains credentials"),
        ("data.pinned.repo=https://host/a.git?token=hunter2", "contains credentials"),
        ("data.root=/$(AWS_SECRET_ACCESS_KEY)", r"contains \$\(, which Kubernetes would replace"),
        ("data.root=/{{workflow.name}}", r"contains \{\{, which Kubeflow would replace"),
    ],
)
def test_what_others_would_read_or_replace_is_not_compiled_and_not_sent(package, tmp_path, override, words):
    pinned = ["data.pinned.revision=main", "data.pinned.path=a"]
    needed = pinned if "pinned" in override else []
    with pytest.raises(InputError, match=words) as caught:
        compile_pipeline(RECIPE, "full", [*needed, override], tmp_path / "pipeline.yaml")
    assert "hunter2" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    for arguments in ({"overrides": [override]}, {"data_digest": override}):
        with pytest.raises(InputError, match=words):
            check_arguments(package, arguments)


def test_compiling_twice_gives_the_same_bytes(package, tmp_path):
    again = compile_pipeline(RECIPE, PROFILE, ["finetune.epochs=3", "seed=2"], tmp_path / "again.yaml")
    assert again.path.read_bytes() == package.path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.yaml"]


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("name", SAMPLED_RECIPES)
def test_every_recipe_compiles(name, profile, tmp_path):
    package = compile_pipeline(
        name, profile, ["data.root=/data"], tmp_path / "pipeline.yaml", placement=PLACEMENT
    )
    assert package.stages == tuple(node.name for node in graph_of(load_recipe(name, profile).stages))


def test_a_recipe_without_pre_training_has_no_weights_to_start_from(tmp_path):
    stages = "stages=[prepare, finetune, evaluate, report]"
    package = compile_pipeline(RECIPE, PROFILE, [stages], tmp_path / "scratch.yaml")
    assert package.stages == ("prepare", "finetune", "evaluate", "report")
    assert next(t for t in package.tasks if t.stage == "finetune").inputs == {"data": "prepare"}


def test_gpu_tasks_of_the_full_profile_say_what_they_need(tmp_path):
    images = {"train": "registry.example/train@sha256:" + "0" * 64, "dense": "registry.example/dense:1"}
    package = compile_pipeline(
        RECIPE, "full", ["data.root=/data"], tmp_path / "full.yaml", images=images, placement=PLACEMENT
    )
    assert any("registry.example/dense:1" in found.what for found in package.findings)
    spec, platform = documents(package.path)
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for task in package.tasks:
        stage = all_stages()[task.stage]
        label = f"exec-{task.stage}"
        config, resources = (
            placed[label],
            spec["deploymentSpec"]["executors"][label]["container"]["resources"],
        )
        assert task.image == images[stage.image]
        assert config["emptyDirMounts"][0]["mountPath"] == "/dev/shm"
        assert config["emptyDirMounts"][0]["sizeLimit"] == f"{stage.resources.shm_gib}Gi"
        assert config["pvcMount"][0]["mountPath"] == "/data"
        assert tasks(package.path)[task.stage]["retryPolicy"]["maxRetryCount"] == stage.resources.retries
        assert resources["resourceMemoryLimit"] == f"{stage.resources.memory_gib}Gi"
        on_gpu = stage.resources.gpus > 0
        assert (
            ("accelerator" in resources) == ("nodeSelector" in config) == ("tolerations" in config) == on_gpu
        )
        if on_gpu:
            assert resources["accelerator"]["resourceCount"] == str(stage.resources.gpus)
            assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"


def test_the_demo_asks_for_no_gpu_and_no_vendor_label(package):
    text = package.path.read_text(encoding="utf-8")
    assert "accelerator" not in text
    assert "nodeSelector" not in text


def broken(package, tmp_path, change):
    first, *rest = copy.deepcopy(documents(package.path))
    change(first, rest)
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump_all([first, *rest]), encoding="utf-8")
    return path


def executors(spec):
    return spec["deploymentSpec"]["executors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, p: s.update(pipelineInf={}), "no Kubeflow pipeline package"),
        (
            lambda s, p: executors(s)["exec-probe"]["container"].update(imag="x"),
            "no Kubeflow pipeline package",
        ),
        (
            lambda s, p: of(s)["probe"].update(retryPolicy=3),
            "no Kubeflow pipeline package",
        ),
        (
            lambda s, p: p[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-probe"].update(
                nodeSelectr={}
            ),
            "no Kubeflow pipeline package",
        ),
        (lambda s, p: executors(s).pop("exec-probe"), "'exec-probe' of task 'probe' does not exist"),
        (
            lambda s, p: executors(s)["exec-probe"]["container"].update(image=""),
            "task 'probe' has no image",
        ),
        (
            lambda s, p: executors(s)["exec-probe"]["container"].update(command=["sh"]),
            "does not run `vitpipe run probe`",
        ),
        (
            lambda s, p: of(s)["evaluate"]["inputs"]["artifacts"]["weights"]["taskOutputArtifact"].update(
                producerTask="training"
            ),
            "comes from 'training', which is not a task",
        ),
        (lambda s, p: s["root"]["dag"]["tasks"].clear(), "it has no tasks"),
    ],
)
def test_a_broken_package_is_refused_with_the_finding(package, tmp_path, change, message):
    with pytest.raises(InputError, match="package") as caught:
        validate_package(broken(package, tmp_path, change))
    assert message in str(caught.value)
    assert "vitpipe compile" in caught.value.fix


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "just text"])
def test_what_is_no_package_at_all(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        validate_package(path)


def test_a_package_that_was_cut(package, tmp_path):
    path = tmp_path / "cut.yaml"
    path.write_bytes(package.path.read_bytes()[:2000])
    with pytest.raises(InputError, match="or a part of one"):
        validate_package(path)


def test_a_missing_package(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        validate_package(tmp_path / "none.yaml")


def test_wrong_recipes_and_names_leave_nothing_behind(tmp_path):
    with pytest.raises(RecipeError, match="did you mean"):
        compile_pipeline("itpn/pixel_bas", PROFILE, [], tmp_path / "x.yaml")
    with pytest.raises(InputError, match=r"ends in \.yaml"):
        compile_pipeline(RECIPE, PROFILE, [], tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []
