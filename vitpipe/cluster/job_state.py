"""What a TrainJob and its pods say, in words: waiting, at work, pre-empted, failed, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vitpipe.cluster.train_job import MANAGED_BY, NODE, OURS, SPEC_DIGEST
from vitpipe.contracts.errors import shortened

COMPLETE, FAILED, SUSPENDED = "Complete", "Failed", "Suspended"
# Reasons of a pod's condition DisruptionTarget (Kubernetes: pod disruption conditions).
_DISRUPTIONS = {
    "PreemptionByScheduler": "a pod of higher priority took its place",
    "DeletionByTaintManager": "its node was tainted, as before a spot node goes",
    "EvictionByEvictionAPI": "it was evicted, as when a node is drained",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node shut down or ran out of a resource",
}
_EXIT_CODES = {
    2: "the stage refuses its input, see its message in the log; starting again does not help",
    130: "it was interrupted with its state saved",
    143: "it was asked to stop and saved its state",
    137: "it was killed, for lack of memory or after the grace period",
}


def is_ours(job: Mapping[str, Any]) -> bool:
    """Whether a launcher of vitpipe has made the job."""
    return (job["metadata"].get("labels") or {}).get(MANAGED_BY) == OURS


def digest_in(job: Mapping[str, Any]) -> str:
    """The digest of what the job was made from; empty if it has none."""
    return str((job["metadata"].get("annotations") or {}).get(SPEC_DIGEST, ""))


def ended(job: Mapping[str, Any]) -> str:
    """`Complete`, `Failed`, or nothing while the job may go on."""
    return next((kind for kind in (COMPLETE, FAILED) if _condition(job, kind)), "")


def described(job: Mapping[str, Any]) -> str:
    """The job's state as one line."""
    if job["metadata"].get("deletionTimestamp"):
        return "is being deleted"
    if kind := ended(job):
        condition = _condition(job, kind)
        return f"{'is complete' if kind == COMPLETE else 'has failed'}{_because(condition)}"
    if condition := _condition(job, SUSPENDED):
        return f"is suspended: it waits in its queue, or has lost its place there{_because(condition)}"
    status = next(
        (s for s in (job.get("status") or {}).get("jobsStatus") or [] if s.get("name") == NODE), None
    )
    if status is None:
        return "waits for Kubeflow Trainer"
    if status.get("ready"):
        return "is at work on all nodes"
    return "waits for its pods" if not status.get("failed") else "starts its pods again"


def disruptions(pods: Iterable[Any]) -> list[str]:
    """One line for every pod that was taken away: pre-empted, evicted, its node gone."""
    lines = []
    for pod in pods:
        for condition in pod.status.conditions or []:
            if condition.type == "DisruptionTarget" and condition.status == "True":
                why = _DISRUPTIONS.get(condition.reason, condition.reason or "no reason is given")
                lines.append(f"the pod {pod.metadata.name} was pre-empted: {why}")
    return lines


def failures(pods: Iterable[Any]) -> list[str]:
    """One line for every pod whose process ended badly: out of memory, wrong input, a signal."""
    lines = []
    for pod in pods:
        for container in pod.status.container_statuses or []:
            end = container.state.terminated if container.state else None
            end = end or (container.last_state.terminated if container.last_state else None)
            if end is None or end.exit_code == 0:
                continue
            if end.reason == "OOMKilled":
                why = "out of memory: raise 'memory' (it holds /dev/shm, too), or lower the micro-batch"
            else:
                why = _EXIT_CODES.get(end.exit_code, "see its log")
            lines.append(f"the pod {pod.metadata.name} ended with code {end.exit_code}: {why}")
    return lines


def remedy(job: Mapping[str, Any], pods: list[Any]) -> str:
    """What to do about a failed job."""
    reason = (_condition(job, FAILED) or {}).get("reason", "")
    if reason == "DeadlineExceeded":
        return "raise active_deadline_seconds; the next run resumes from the saved state"
    if reason == "TrainingRuntimeNotSupported":
        return "name a runtime with the torch policy (`kubectl get clustertrainingruntimes`)"
    if any("code 2:" in line for line in failures(pods)):
        return "correct what the stage's own message says; a retry meets the same"
    if disruptions(pods):
        return "run the same command again (a retry of the task does): it resumes from the saved state"
    return "see the log above; the same command makes the job again and resumes from the saved state"


def _condition(job: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    found = (job.get("status") or {}).get("conditions") or []
    return next((c for c in found if c.get("type") == kind and c.get("status") == "True"), None)


def _because(condition: Mapping[str, Any] | None) -> str:
    parts = [str((condition or {}).get(key) or "") for key in ("reason", "message")]
    text = shortened(": ".join(part for part in parts if part))
    return f" ({text})" if text else ""
