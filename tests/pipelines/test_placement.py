"""Placement files: what is refused, what fits a node, time limits, and what lands in a package."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recipe_samples import SAMPLED_RECIPES

from pipelines.compile import compile_pipeline
from pipelines.lint import leaf_tasks
from pipelines.node_types import NODE_TYPES
from pipelines.place import QUEUE_LABEL, check_fits, resources_of, timeout_seconds_of
from pipelines.placement import Placement, read_placement
from pipelines.time_limits import expected_hours, limit_hours, retry_window_seconds
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.graph import EIGHT_GPUS, ONE_GPU, all_stages, graph_of

RECIPE = "itpn/pixel_base"
STATE = "claims: {state: {name: s, path: /state}}\n"


def written(tmp_path, text):
    path = tmp_path / "placement.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pols: {}", r"'pols'.*did you mean 'pools'"),
        ("node_selector: {}", "in pools.gpu now"),
        ("data_claim: sets", "in claims.data now"),
        ("stages: {pretrain: {timeout_hours: -1}}", "timeout_hours"),
        ("stages: {pretran: {gpus: 1}}", "'stages.pretran' is no stage .did you mean 'pretrain'"),
        ("stages: {pretrain: {pool: big}}", "'big', which is not in 'pools'"),
        ("stages: {pretrain: {nodes: 2}}", "needs 'claims.state'"),
        ("stages: {pretrain: {gpus: -1}}", "gpus"),
        ("pools: {gpu: {tolerations: [{key: a, operator: Is}]}}", "operator"),
        ("pools: {gpu: {node_type: a2-highgpu-8}}", "did you mean 'a2-highgpu-8g'"),
        ("pools: {gpu: {node_selector: {a: 'b c'}}}", "no value of a label"),
        ("labels: {team: 'a/b'}", "no value of a label"),
        ("queue: 'my queue'", "no value of a label"),
        ("claims: {state: {name: S_1, path: /state}}", "no name of a Kubernetes object"),
        ("claims: {state: {name: s, path: state}}", "no absolute path"),
        ("claims: {state: {name: s, path: /state, access_mode: ReadOnlyMany}}", "ReadOnlyMany, but states"),
        ("claims: {state: {name: s, path: /tmp/x}}", "would hide"),
        ("claims: {state: {name: s, path: /d}, data: {name: r, path: /d}}", "both claims"),
        ("environment: {AWS_SECRET_ACCESS_KEY: abc}", "looks like a secret"),
        ("environment: {1A: abc}", "no name of a variable"),
        ("environment: {A: '$(B)'}", r"contains \$\("),
        ("annotations: {a: '{{workflow.name}}'}", "contains {{"),
        ("tracking: {uri: 'http://me:hunter2@mlflow'}", "contains credentials"),
        ("pages: 'https://me:hunter2@kubeflow'", "'pages' contains credentials"),
        ("tracking: {}", "tracking.uri"),
        ("user: 0", "user"),
        ("queueing_hours: .inf", "queueing_hours"),
        ("a: [", "not YAML"),
        ("- 1", "invalid"),
    ],
)
def test_a_wrong_placement_file(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_placement(written(tmp_path, text))
    assert "hunter2" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path):
    text = f"{STATE}stages: {{pretran: {{gpus: 1}}, finetune: {{pool: x}}}}\nenvironment: {{TOKEN: a}}"
    with pytest.raises(InputError, match=r"pretran.*'x'.*TOKEN"):
        read_placement(written(tmp_path, text))


def test_a_placement_from_its_file(tmp_path):
    given = read_placement(written(tmp_path, "queue: a100\nstages: {probe: {timeout_hours: 5}}\n"))
    assert given == Placement(queue="a100", stages={"probe": {"timeout_hours": 5}})
    assert read_placement(written(tmp_path, "")) == Placement()
    with pytest.raises(InputError, match="cannot be read"):
        read_placement(tmp_path / "none.yaml")


def test_what_never_fits_a_node_is_refused(tmp_path):
    """80 GiB on a node of 85: kubelet and system keep 7 of them."""
    small = {"pools": {"gpu": {"node_type": "a2-highgpu-1g"}}}
    recipe = load_recipe(RECIPE, "full", ["data.root=/data"])
    nodes = [(node.stage, recipe) for node in graph_of(recipe.stages, recipe.start_from)]
    with pytest.raises(InputError, match="pretrain asks for 8 GPUs of 1, 88 cores of") as caught:
        check_fits(iter(nodes), Placement(**small))
    assert "probe" not in str(caught.value)
    own = {stage: {"gpus": 1, "cpus": 10, "memory_gib": 64} for stage in all_stages()}
    check_fits(iter(nodes), Placement(**small, stages=own))
    own["probe"]["memory_gib"] = 80
    with pytest.raises(InputError, match=r"No node can run.*probe asks for 80 GiB of 76\.7") as caught:
        compile_pipeline(
            RECIPE,
            "full",
            ["data.root=/data"],
            tmp_path / "p.yaml",
            placement=Placement(**small, stages=own),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NODE_TYPES)
def test_the_graphs_own_sizes_fit_the_machines_they_are_meant_for(name):
    machine = NODE_TYPES[name]
    assert not machine.misfit(EIGHT_GPUS if machine.gpus >= 8 else ONE_GPU)
    assert machine.misfit(replace(ONE_GPU, gpus=machine.gpus + 1))


@pytest.mark.parametrize("name", SAMPLED_RECIPES)
def test_a_limit_leaves_room_for_a_slow_run_and_ends_a_hanging_one(name):
    recipe = load_recipe(name, "full", ["data.root=/data"])
    for node in graph_of(recipe.stages, recipe.start_from):
        expected = expected_hours(node.stage, recipe, node.stage.resources)
        limit = limit_hours(node.stage, recipe, node.stage.resources)
        assert 2 <= limit <= 4000, node.name
        if expected is not None:
            assert expected * 4 <= limit <= expected * 4 + 3
            # Twice the GPUs, half the time.
            assert expected_hours(node.stage, recipe, node.stage.resources, 2) == pytest.approx(
                expected / 2, rel=0.01
            )


def test_the_limit_of_the_longest_published_training_is_above_a_week():
    """iTPN-L, 1,600 epochs: the same 72 hours for every task would have ended it."""
    recipe = load_recipe("itpn/pixel_large", "full", ["data.root=/data"])
    assert limit_hours(all_stages()["pretrain"], recipe, EIGHT_GPUS) > 7 * 24


@given(st.integers(1, 10**7), st.integers(0, 20), st.floats(0, 1000))
def test_the_window_of_retries_holds_every_try(timeout, retries, queueing):
    window = retry_window_seconds(timeout, retries, queueing)
    assert window >= (retries + 1) * (timeout + queueing * 3600)


@pytest.mark.parametrize("name", SAMPLED_RECIPES)
def test_every_package_allows_its_retries(name, tmp_path):
    """kfp's backoffMaxDuration is the whole time in which a task may be retried."""
    placement = Placement(stages={"finetune": {"retries": 7, "timeout_hours": 3}}, queueing_hours=5)
    path = compile_pipeline(name, "full", ["data.root=/data"], tmp_path / "p.yaml", placement=placement).path
    spec, platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for stage, task, _ in leaf_tasks(spec):
        policy, timeout = task["retryPolicy"], int(executors[f"exec-{stage}"]["activeDeadlineSeconds"])
        window = int(policy["backoffMaxDuration"].removesuffix("s"))
        assert window >= (policy["maxRetryCount"] + 1) * (timeout + 5 * 3600)
        if stage == "finetune":
            assert (policy["maxRetryCount"], timeout) == (7, 3 * 3600)


def test_a_stage_may_have_other_resources_than_the_graph():
    recipe = load_recipe(RECIPE, "full", ["data.root=/data"])
    placement = Placement(stages={"pretrain": {"gpus": 2, "memory_gib": 160.5, "timeout_hours": 1.5}})
    stage = all_stages()["pretrain"]
    assert resources_of(stage, recipe, placement) == replace(EIGHT_GPUS, gpus=2, memory_gib=160.5)
    assert timeout_seconds_of(stage, recipe, placement) == 5400


def test_all_of_a_placement_lands_in_the_package(tmp_path):
    placement = Placement(
        pools={"gpu": {"node_selector": {"g": "a"}}, "cpu": {"node_selector": {"c": "b"}}},
        stages={"probe": {"pool": "cpu"}},
        claims={"data": {"name": "sets", "path": "/data"}, "state": {"name": "kept", "path": "/state"}},
        scratch={"size_gib": 20},
        tracking={"uri": "http://mlflow:5000", "experiment": "e", "secret": "login"},
        labels={"team": "vision"},
        pages="https://kubeflow.example",
        queue="a100",
        annotations={"karpenter.sh/do-not-disrupt": "true"},
        pull_secrets=("registry",),
        pull_policy="Always",
        environment={"NCCL_DEBUG": "WARN"},
    )
    path = compile_pipeline(
        RECIPE, "full", ["data.root=/data"], tmp_path / "p.yaml", placement=placement
    ).path
    spec, platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for label, config in executors.items():
        stage = label.removeprefix("exec-")
        known = all_stages().get(stage)  # none of the checks and the conclusion
        on_gpu = stage == "check-gpu" or (known is not None and known.resources.gpus > 0 and stage != "probe")
        assert config["nodeSelector"]["labels"] == ({"g": "a"} if on_gpu else {"c": "b"})
        assert {mount["constant"]: mount["mountPath"] for mount in config["pvcMount"]} == {
            "sets": "/data",
            "kept": "/state",
        }
        assert config["podMetadata"]["labels"] == {
            "team": "vision",
            "vitpipe/recipe": "itpn.pixel_base",
            "vitpipe/profile": "full",
            "vitpipe/stage": stage,
            QUEUE_LABEL: "a100",
        }
        assert config["podMetadata"]["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}
        assert config["imagePullSecret"][0]["secretName"] == "registry"
        assert config["imagePullPolicy"] == "Always"
        assert config["genericEphemeralVolume"][0]["mountPath"] == "/tmp"
        names = {e["envVar"] for e in config["secretAsEnv"][0]["keyToEnv"]}
        assert names == {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
        container = spec["deploymentSpec"]["executors"][label]["container"]
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert environment == {
            "VITPIPE_IMAGE": container["image"],
            "VITPIPE_STATES": "/state",
            "VITPIPE_KUBEFLOW_PAGES": "https://kubeflow.example",
            "MLFLOW_TRACKING_URI": "http://mlflow:5000",
            "MLFLOW_EXPERIMENT_NAME": "e",
            "NCCL_DEBUG": "WARN",
        }
