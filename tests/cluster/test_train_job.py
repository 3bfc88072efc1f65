"""The rendered TrainJob: what Trainer's own models read, names, digests; and settings with all their mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from vitpipe.cluster.settings import (
    ClaimMount,
    JobToleration,
    SecretVariable,
    TrainJobSettings,
    launch_arguments,
    read_settings,
    settings_text,
)
from vitpipe.cluster.train_job import SPEC_DIGEST, check_shared, job_name, train_job
from vitpipe.contracts.errors import InputError

COMMAND = ["vitpipe", "run", "pretrain", "--recipe", "itpn/pixel_base"]
FULL = TrainJobSettings(
    image="registry/vitpipe@sha256:00", num_nodes=2, gpus_per_node=8, cpu="88", memory="640Gi", shm="64Gi",
    resources={"vpc.amazonaws.com/efa": "4"}, runtime="vit-torch", namespace="vit", queue="a100",
    labels={"team": "vision"}, annotations={"karpenter.sh/do-not-disrupt": "true"},
    node_selector={"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"},
    tolerations=(JobToleration(key="nvidia.com/gpu", effect="NoSchedule"),),
    environment={"NCCL_DEBUG": "WARN", "MLFLOW_TRACKING_URI": "http://mlflow:5000"},
    secrets=(SecretVariable(variable="MLFLOW_TRACKING_TOKEN", secret="mlflow", key="token", optional=True),),
    claims=(ClaimMount(claim="runs", path="/runs"),
            ClaimMount(claim="datasets", path="/data", read_only=True, sub_path="raw")),
    pull_secrets=("registry",), service_account="trainer", active_deadline_seconds=3600,
)  # fmt: skip
LEAST = TrainJobSettings(
    image="i", num_nodes=1, gpus_per_node=0, cpu="2", memory="8Gi", user=None,
    claims=(ClaimMount(claim="runs", path="/runs"),),
)  # fmt: skip


@pytest.mark.parametrize("settings", [FULL, LEAST], ids=["full", "least"])
def test_trainers_own_models_read_every_field(settings):
    """`from_dict` drops what it does not know without a word; then the two would differ."""
    job = train_job("pretrain-x", settings, COMMAND)
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job


def test_a_misspelt_field_is_found_by_that_comparison():
    job = train_job("pretrain-x", FULL, COMMAND)
    job["spec"]["trainer"]["numNode"] = job["spec"]["trainer"].pop("numNodes")
    assert TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job


def test_everything_has_its_place():
    job = train_job("pretrain-x", FULL, COMMAND)
    spec = job["spec"]
    assert job["metadata"]["labels"] == {
        "team": "vision",
        "app.kubernetes.io/managed-by": "vitpipe",
        "kueue.x-k8s.io/queue-name": "a100",
    }
    assert spec["trainer"]["command"] + spec["trainer"]["args"] == COMMAND
    assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (2, 8)
    limits = {"memory": "640Gi", "nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "4"}
    assert spec["trainer"]["resourcesPerNode"] == {"limits": limits, "requests": {**limits, "cpu": "88"}}
    # Trainer refuses the variables of its own plugin, and takes variables here only, not in a patch.
    names = [variable["name"] for variable in spec["trainer"]["env"]]
    assert names[:3] == ["PET_MAX_RESTARTS", "POD_NAME", "VITPIPE_IMAGE"]
    (patch,) = spec["runtimePatches"]
    (nodes,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = nodes["template"]["spec"]["template"]
    assert nodes["name"] == pod["spec"]["containers"][0]["name"] == "node"
    assert pod["metadata"]["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}
    mounts = {m["mountPath"]: m for m in pod["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["/data"] == {"name": "claim-1", "mountPath": "/data", "readOnly": True, "subPath": "raw"}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert {mounts[path]["name"] for path in mounts} == volumes.keys()
    assert pod["spec"]["securityContext"]["runAsUser"] == 1000


def test_the_digest_is_that_of_what_is_asked_for():
    def digest(settings, command=COMMAND):
        return train_job("pretrain-x", settings, command)["metadata"]["annotations"][SPEC_DIGEST]

    assert digest(FULL) == digest(read_settings(settings_text(FULL)))
    reordered = FULL.model_copy(update={"environment": dict(reversed(FULL.environment.items()))})
    assert digest(reordered) == digest(FULL)
    changed = {digest(FULL.model_copy(update=change)) for change in (
        {"image": "other"}, {"num_nodes": 3}, {"labels": {}}, {"queue": ""}, {"restarts": 0}, {"shm": "8Gi"},
    )}  # fmt: skip
    assert len(changed | {digest(FULL), digest(FULL, [*COMMAND, "--set", "seed=1"])}) == 8
    # How long a launcher waits is no part of the job.
    assert digest(FULL.model_copy(update={"unreachable_seconds": 5})) == digest(FULL)


@given(st.text(min_size=1, max_size=80), st.text(max_size=120), st.integers())
def test_names_are_labels_whatever_a_plugin_calls_its_stage(stage, recipe, key):
    name = job_name(stage, recipe, key)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    # With what JobSet adds for the pods of a hundred nodes.
    assert len(f"{name}-node-0-99-abcde") <= 63
    assert name == job_name(stage, recipe, key) != job_name(stage, recipe, key + 1)


def test_a_name_tells_stage_and_recipe():
    assert re.fullmatch(r"pretrain-itpn-pixel-base-[0-9a-f]{12}", job_name("pretrain", "itpn/pixel_base", {}))


def test_settings_travel_as_one_argument():
    command = launch_arguments(
        "pretrain", "itpn/pixel_base", "full", FULL, Path("/runs"), "{{$}}", ["--states", "/runs/s"]
    )
    assert command[:2] == ["vitpipe", "launch"]
    assert read_settings(command[command.index("--job") + 1]) == FULL
    assert command[command.index("--executor-input") + 1] == "{{$}}"
    assert command[-2:] == ["--states", "/runs/s"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"num_nods": 2}, ["'num_nods' is not a known key (did you mean 'num_nodes'?)"]),
        ({"image": None}, ["'image'"]),
        ({"memory": "lots", "gpus_per_node": 99}, ["'memory'", "given: 'lots'", "'gpus_per_node'"]),
        ({"environment": {"PET_NNODES": "3"}}, ["is set by the job itself"]),
        ({"environment": {"A B": "3"}}, ["no name of a variable"]),
        ({"claims": []}, ["'claims'"]),
        ({"claims": [{"claim": "a", "path": "runs"}]}, ["an absolute path below / is expected"]),
        ({"claims": [{"claim": "a", "path": "/x"}, {"claim": "b", "path": "/x/"}]}, ["the same path"]),
        (
            {"environment": {"A": "1"}, "secrets": [{"variable": "A", "secret": "s", "key": "k"}]},
            ["a variable is given twice"],
        ),
        ({"user": 0}, ["'user'"]),
        ({"labels": {"team": "two words"}}, ["'labels.team'"]),
    ],
)
def test_mistakes_are_named_all_at_once(change, parts):
    values = {**json.loads(settings_text(FULL)), **change}
    with pytest.raises(InputError) as caught:
        read_settings(json.dumps(values))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.exit_code == 2


def test_text_that_is_no_json_is_named():
    with pytest.raises(InputError, match="it is not JSON"):
        read_settings("{num_nodes: 2")


@pytest.mark.parametrize(
    ("place", "part"),
    [("/data/x", "it is on datasets, read-only"), ("/elsewhere", "its pods would not see it")],
)
def test_a_shared_folder_must_be_on_a_writable_claim(place, part):
    check_shared(Path("/runs/here"), FULL)
    with pytest.raises(InputError, match=part):
        check_shared(Path(place), FULL)
