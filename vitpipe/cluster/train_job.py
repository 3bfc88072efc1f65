"""A Kubeflow Trainer `TrainJob` (trainer.kubeflow.org/v1alpha1, Trainer 2.3) from settings and a command.

The same input gives the same text: the digest in its annotation tells whether a job that exists already is
the one that is wanted. Fields of the pods that a TrainJob has no place for travel in `runtimePatches`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vitpipe.cluster.settings import TrainJobSettings
from vitpipe.config.digest import digest_of
from vitpipe.contracts.errors import InputError
from vitpipe.stages.pipeline_run import IMAGE_VARIABLE, POD_VARIABLE

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
MANAGED_BY, OURS = "app.kubernetes.io/managed-by", "vitpipe"
SPEC_DIGEST = "vitpipe/spec-digest"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# Trainer's name for the replicated job and for the container whose image and command the TrainJob sets.
NODE = "node"
_PATCHED_BY = "vitpipe/launcher"
# JobSet's pods are called NAME-node-0-INDEX-xxxxx, and that is a label of at most 63 characters.
_MAX_NAME, _DIGEST_CHARACTERS = 44, 12


def job_name(stage: str, recipe: str, key: Any) -> str:
    """The name of a stage's job: `STAGE-RECIPE-DIGEST`, an RFC 1035 label of at most 44 characters.

    Args:
        key: what makes the run this one (run id, identity, inputs), JSON-able. The same key, the same name.
    """
    digest = digest_of(key)[:_DIGEST_CHARACTERS]
    words = re.sub(r"[^a-z0-9]+", "-", f"{stage}-{recipe}".lower()).strip("-")
    if not words[:1].isalpha():
        words = f"v-{words}"
    return f"{words[: _MAX_NAME - _DIGEST_CHARACTERS - 1].rstrip('-')}-{digest}"


def train_job(name: str, settings: TrainJobSettings, command: Sequence[str]) -> dict[str, Any]:
    """The TrainJob as plain values, without a namespace.

    Args:
        command: of every node, program first.
    """
    spec = _without_empty(
        {
            "runtimeRef": {"apiGroup": GROUP, "kind": settings.runtime_kind, "name": settings.runtime},
            "activeDeadlineSeconds": settings.active_deadline_seconds,
            "trainer": {
                "image": settings.image,
                "command": [command[0]],
                "args": list(command[1:]),
                "numNodes": settings.num_nodes,
                "numProcPerNode": settings.processes_per_node,
                "resourcesPerNode": _resources(settings),
                "env": _environment(settings),
            },
            "runtimePatches": [
                {
                    "manager": _PATCHED_BY,
                    "trainingRuntimeSpec": {
                        "template": {"spec": {"replicatedJobs": [{"name": NODE, **_pods(settings)}]}}
                    },
                }
            ],
        }
    )
    labels = {**settings.labels, MANAGED_BY: OURS}
    if settings.queue:
        labels[QUEUE_LABEL] = settings.queue
    digest = digest_of({"labels": labels, "annotations": settings.annotations, "spec": spec})
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": labels,
            "annotations": {**settings.annotations, SPEC_DIGEST: digest},
        },
        "spec": spec,
    }


def check_shared(shared: Path, settings: TrainJobSettings) -> None:
    """Check that the job's pods see and may write the launcher's shared folder.

    Raises:
        InputError: no claim is mounted there, or read-only.
    """
    place = PurePosixPath(shared)
    # The innermost mount is the one that a path belongs to.
    mounts = sorted(settings.claims, key=lambda mount: len(mount.path), reverse=True)
    mount = next((found for found in mounts if place.is_relative_to(found.path)), None)
    if mount is not None and not mount.read_only:
        return
    raise InputError(
        f"The shared folder lies on no claim of the job that is writable "
        f"({'it is on ' + mount.claim + ', read-only' if mount else 'its pods would not see it'})",
        where=f"--shared {shared}",
        fix="mount a ReadWriteMany claim into the launcher and, with the same path, into the job "
        '("claims": [{"claim": NAME, "path": PATH}])',
    )


def _resources(settings: TrainJobSettings) -> dict[str, dict[str, str]]:
    exact = {"memory": settings.memory, **settings.resources}
    if settings.gpus_per_node:
        exact[settings.gpu_resource] = str(settings.gpus_per_node)
    # No CPU limit: the kernel would throttle the pod at it even when other cores of the node are idle.
    return {"limits": exact, "requests": {"cpu": settings.cpu, **exact}}


def _environment(settings: TrainJobSettings) -> list[dict[str, Any]]:
    secrets = [
        {
            "name": secret.variable,
            "valueFrom": {
                "secretKeyRef": {
                    "name": secret.secret,
                    "key": secret.key,
                    **({"optional": True} if secret.optional else {}),
                }
            },
        }
        for secret in settings.secrets
    ]
    pod = {"fieldRef": {"fieldPath": "metadata.name"}}
    return [
        {"name": "PET_MAX_RESTARTS", "value": str(settings.restarts)},
        # Names the owner of a folder's lock, and is a tag in MLflow as the image is.
        {"name": POD_VARIABLE, "valueFrom": pod},
        {"name": IMAGE_VARIABLE, "value": settings.image},
        *({"name": name, "value": value} for name, value in sorted(settings.environment.items())),
        *secrets,
    ]


def _pods(settings: TrainJobSettings) -> dict[str, Any]:
    """The patch of the replicated job: metadata and surroundings of its pods."""
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for number, mount in enumerate(settings.claims):
        source = {"claimName": mount.claim, "readOnly": mount.read_only}
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": source})
        mounts.append(
            {
                "name": f"claim-{number}",
                "mountPath": mount.path,
                "readOnly": mount.read_only,
                **({"subPath": mount.sub_path} if mount.sub_path else {}),
            }
        )
    if settings.shm:
        memory = {"medium": "Memory", "sizeLimit": settings.shm}
        volumes.append({"name": "shared-memory", "emptyDir": memory})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    user = settings.user
    ids = {"runAsUser": user, "runAsGroup": user, "fsGroup": user, "runAsNonRoot": True} if user else {}
    spec = {
        "nodeSelector": settings.node_selector,
        "tolerations": [item.model_dump(exclude_none=True) for item in settings.tolerations],
        "imagePullSecrets": [{"name": name} for name in settings.pull_secrets],
        "serviceAccountName": settings.service_account,
        "securityContext": ids,
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "volumes": volumes,
        "containers": [{"name": NODE, "volumeMounts": mounts}],
    }
    metadata = {"labels": {**settings.labels, MANAGED_BY: OURS}, "annotations": settings.annotations}
    template = {"metadata": _without_empty(metadata), "spec": _without_empty(spec)}
    return {"template": {"spec": {"template": template}}}


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, "", [], {})}
