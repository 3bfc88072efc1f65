"""What a cluster would refuse, or should: schemas, security, limits, names that nothing has."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1ClusterTrainingRuntime
from overlay_secrets import CLOUD

from pipelines.placement import read_placement

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.33"
OVERLAYS = ("local", "gke-a100", "eks-a100")
PLACEMENT_OF = {"local": "plain", "gke-a100": "gke", "eks-a100": "eks"}
# Kinds whose definitions a cluster gets from Kueue, Trainer and Karpenter, with the fields that ours may have.
OTHERS = {
    "ResourceFlavor": {"nodeLabels", "tolerations", "nodeTaints"},
    "ClusterQueue": {"namespaceSelector", "queueingStrategy", "preemption", "resourceGroups", "cohortName"},
    "LocalQueue": {"clusterQueue"},
    "WorkloadPriorityClass": set(),
    "ClusterTrainingRuntime": {"mlPolicy", "template"},
    "NodePool": {"template", "disruption", "limits", "weight"},
    "EC2NodeClass": {
        "role", "amiSelectorTerms", "subnetSelectorTerms", "securityGroupSelectorTerms", "blockDeviceMappings",
        "metadataOptions",
    },
}  # fmt: skip
VERSIONS = {
    "kueue.x-k8s.io/v1beta2", "trainer.kubeflow.org/v1alpha1", "karpenter.sh/v1", "karpenter.k8s.aws/v1",
}  # fmt: skip

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] in kinds]


def names(objects: list[dict[str, Any]], *kinds: str) -> set[str]:
    return {item["metadata"]["name"] for item in of_kind(objects, *kinds)}


def pod_specs(objects: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for item in objects:
        if item["kind"] in ("Deployment", "StatefulSet"):
            found.append((item["metadata"]["name"], item["spec"]["template"]["spec"]))
        elif item["kind"] == "CronJob":
            found.append((item["metadata"]["name"], item["spec"]["jobTemplate"]["spec"]["template"]["spec"]))
        elif item["kind"] == "ClusterTrainingRuntime":
            for job in item["spec"]["template"]["spec"]["replicatedJobs"]:
                found.append((item["metadata"]["name"], job["template"]["spec"]["template"]["spec"]))
    return found


def containers(objects: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{name}/{container['name']}", container)
        for name, spec in pod_specs(objects)
        for container in (*spec.get("initContainers", ()), *spec["containers"])
    ]


@overlays
def test_every_object_is_valid(built, overlay):
    for item in built(overlay):
        if item["kind"] in OTHERS:
            assert item["apiVersion"] in VERSIONS, item["apiVersion"]
            assert set(item.get("spec", {})) <= OTHERS[item["kind"]], item["kind"]
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


@overlays
def test_a_mistyped_field_is_found(built, overlay):
    broken = dict(of_kind(built(overlay), "Service")[0])
    broken["spec"] = {**broken["spec"], "selectors": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


@overlays
def test_trainer_reads_every_field_of_the_runtime(built, overlay):
    """Its models drop what they do not know, so what comes back is compared."""
    (runtime,) = of_kind(built(overlay), "ClusterTrainingRuntime")
    assert TrainerV1alpha1ClusterTrainingRuntime.from_dict(runtime).to_dict() == runtime
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules


@overlays
def test_pods_fulfil_the_restricted_standard_and_have_limits(built, overlay):
    objects = built(overlay)
    (namespace,) = of_kind(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, spec in pod_specs(objects):
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"].get("runAsUser") != 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert all("hostPath" not in volume for volume in spec.get("volumes", ())), name
    for name, container in containers(objects):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert "memory" in container["resources"]["limits"], name
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        # Exact tags; the digest of what was pushed is the overlay's.
        assert re.search(r":[0-9][^:]*$|@sha256:", container["image"]), name


@overlays
def test_servers_are_probed_and_nothing_is_reached_by_chance(built, overlay):
    objects = built(overlay)
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        for container in item["spec"]["template"]["spec"]["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= set(container), item["metadata"]["name"]
    policies = {item["metadata"]["name"]: item["spec"] for item in of_kind(objects, "NetworkPolicy")}
    assert policies["deny-ingress"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    selected = {
        spec["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name") for spec in policies.values()
    }
    assert {item["metadata"]["name"] for item in of_kind(objects, "Deployment", "StatefulSet")} <= selected


@overlays
def test_the_server_answers_to_its_names_with_and_without_port(built, overlay):
    """MLflow compares the Host header as it is: another one is answered 403 while /health stays green."""
    (settings,) = (
        m for m in of_kind(built(overlay), "ConfigMap") if m["metadata"]["name"] == "mlflow-settings"
    )
    allowed = settings["data"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    for host in ("mlflow", "mlflow.vitpipe", "mlflow.vitpipe.svc", "mlflow.vitpipe.svc.cluster.local"):
        assert {host, f"{host}:5000"} <= set(allowed)
    assert all(re.fullmatch(r"[a-z0-9.:-]+", host) for host in allowed)


@overlays
def test_what_a_placement_names_is_there(built, overlay):
    """Secrets, claims, account, queue and runtime: a pod that names another one waits for ever."""
    objects = built(overlay)
    placement = read_placement(ROOT / f"k8s/placement/{PLACEMENT_OF[overlay]}.yaml")
    assert {placement.claims.data.name, placement.claims.state.name} <= names(
        objects, "PersistentVolumeClaim"
    )
    assert placement.tracking.secret in names(objects, "Secret")
    (login,) = (s for s in of_kind(objects, "Secret") if s["metadata"]["name"] == placement.tracking.secret)
    assert {"username", "password"} <= set(login["data"])
    assert placement.train_jobs.runtime in names(objects, "ClusterTrainingRuntime")
    if placement.service_account:
        assert placement.service_account in names(objects, "ServiceAccount")
    if placement.queue:
        assert placement.queue in names(objects, "LocalQueue")
    host = placement.tracking.uri.split("//")[1]
    (settings,) = (m for m in of_kind(objects, "ConfigMap") if m["metadata"]["name"] == "mlflow-settings")
    assert host in settings["data"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


@overlays
def test_what_the_pods_name_is_there(built, overlay):
    objects = built(overlay)
    secrets, maps = (
        {i["metadata"]["name"]: i for i in of_kind(objects, kind)} for kind in ("Secret", "ConfigMap")
    )
    for name, spec in pod_specs(objects):
        if "serviceAccountName" in spec:
            assert spec["serviceAccountName"] in names(objects, "ServiceAccount"), name
        for volume in spec.get("volumes", ()):
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps, name
            if "secret" in volume:
                held = secrets[volume["secret"]["secretName"]]["data"]
                assert {item["key"] for item in volume["secret"]["items"]} <= set(held), name
    for name, container in containers(objects):
        for variable in container.get("env", ()):
            source = variable.get("valueFrom", {}).get("secretKeyRef")
            assert source is None or source["key"] in secrets[source["name"]]["data"], name
        for source in container.get("envFrom", ()):
            assert source["configMapRef"]["name"] in maps, name


@overlays
def test_queues_name_flavors_that_exist(built, overlay):
    objects = built(overlay)
    (queue,) = of_kind(objects, "ClusterQueue")
    for group in queue["spec"]["resourceGroups"]:
        flavors = [flavor["name"] for flavor in group["flavors"]]
        assert set(flavors) <= names(objects, "ResourceFlavor")
        for flavor in group["flavors"]:  # Kueue asks for the same resources in the same order
            assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
    for local in of_kind(objects, "LocalQueue"):
        assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    if overlay != "local":
        assert [f["name"] for f in queue["spec"]["resourceGroups"][0]["flavors"]][:2] == [
            "a100-spot",
            "a100-on-demand",
        ]


@overlays
def test_the_launcher_may_handle_train_jobs_and_nothing_else(built, overlay):
    (role,) = (r for r in of_kind(built(overlay), "Role") if r["metadata"]["name"] == "vitpipe-launcher")
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == {
        *(
            ("trainer.kubeflow.org", "trainjobs", verb)
            for verb in ("create", "delete", "get", "list", "watch")
        ),
        ("", "pods", "list"),
        ("", "pods/log", "get"),
    }


def test_no_secret_is_in_the_repository():
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "k8s"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not [name for name in tracked if "/secrets/" in name or name.endswith(".env")]
    for name in tracked:
        if name.endswith(".yaml"):
            kinds = [
                d.get("kind") for d in yaml.safe_load_all((ROOT / name).read_text(encoding="utf-8")) if d
            ]
            assert "Secret" not in kinds, name


def test_secrets_are_private_random_and_kept(manifests, tmp_path):
    overlay = tmp_path / "local"
    overlay.mkdir()
    (overlay / "kustomization.yaml").touch()
    command = ["sh", str(manifests / "secrets.sh"), str(overlay)]
    subprocess.run(command, check=True, capture_output=True)
    files = {path.name: path.read_text(encoding="utf-8") for path in (overlay / "secrets").iterdir()}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (overlay / "secrets").iterdir())
    password = re.search(r"password=(\w{32})\n", files["login.env"])[1]
    assert f"admin_password = {password}\n" in files["basic_auth.ini"]
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "is kept" in again.stderr
    assert files == {path.name: path.read_text(encoding="utf-8") for path in (overlay / "secrets").iterdir()}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "DATABASE_HOST is not set"),
        (CLOUD | {"DATABASE_PASSWORD": "a@b"}, "DATABASE_PASSWORD has characters"),
        (CLOUD | {"DATABASE_PASSWORD": "a%b"}, "DATABASE_PASSWORD has characters"),
        (CLOUD | {"DATABASE_HOST": "me@db"}, "DATABASE_HOST has characters"),
        (CLOUD | {"STORAGE_SECRET_KEY": "a\nadmin=b"}, "STORAGE_SECRET_KEY has characters"),
        (CLOUD | {"STORAGE_ACCESS_KEY": "é"}, "STORAGE_ACCESS_KEY has characters"),
    ],
)  # fmt: skip
def test_secrets_of_a_cloud_are_asked_for(manifests, tmp_path, variables, words):
    overlay = tmp_path / "gke"
    overlay.mkdir()
    (overlay / "kustomization.yaml").touch()
    done = subprocess.run(
        ["sh", str(manifests / "secrets.sh"), str(overlay)],
        env={"PATH": os.environ["PATH"], **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert list(overlay.iterdir()) == [overlay / "kustomization.yaml"]


@pytest.mark.parametrize("name", ["secrets.new", "secrets.old", "secrets.abc"])
def test_folders_beside_the_secrets_are_nobodys_to_remove(manifests, tmp_path, name):
    overlay = tmp_path / "local"
    (overlay / name).mkdir(parents=True)
    (overlay / name / "mine.txt").write_text("notes")
    (overlay / "kustomization.yaml").touch()
    subprocess.run(["sh", str(manifests / "secrets.sh"), str(overlay)], check=True, capture_output=True)
    assert (overlay / name / "mine.txt").read_text() == "notes"
    assert sorted(path.name for path in overlay.iterdir()) == sorted(["kustomization.yaml", "secrets", name])


def test_of_several_at_the_same_time_one_makes_the_secrets(manifests, tmp_path):
    overlay = tmp_path / "local"
    overlay.mkdir()
    (overlay / "kustomization.yaml").touch()
    command = ["sh", str(manifests / "secrets.sh"), str(overlay)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(8)]
    printed = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    assert sum(b"log in to MLflow" in out for out, _ in printed) == 1
    assert sorted(path.name for path in overlay.iterdir()) == ["kustomization.yaml", "secrets"]
    assert {path.suffix for path in (overlay / "secrets").iterdir()} == {".env", ".ini"}


def test_a_file_in_the_place_of_the_secrets_is_kept(manifests, tmp_path):
    (tmp_path / "kustomization.yaml").touch()
    (tmp_path / "secrets").write_text("mine")
    command = ["sh", str(manifests / "secrets.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "is a file" in done.stderr) == (2, True)
    assert (tmp_path / "secrets").read_text() == "mine"
