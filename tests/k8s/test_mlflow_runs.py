"""MLflow and Postgres run by Docker as the manifest says: image, arguments, environment, securityContext.

The containers share one network without a way out, in which the Services' names are the loopback. Stand-ins:
Debian's Postgres under the official image's name (postgres_stand_in/), moto's S3 for the object store.
"""

from __future__ import annotations

import base64
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CLIENT, PLAIN = "vitpipe-train:0.1.0", "vitpipe-dev:latest"
NAMES = ("postgres", "object-store", "mlflow", "mlflow.vitpipe.svc.cluster.local")

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(600)]

# Logs in as the pipelines do, and as nobody, and asks for an artifact back.
ASK = """
import json, mlflow, os, urllib.request, urllib.error
answers = {}
for host in ("mlflow:5000", "mlflow.vitpipe.svc.cluster.local:5000", "evil.example"):
    request = urllib.request.Request("http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1",
                                     headers={"Host": host})
    try:
        answers[host] = urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        answers[host] = error.code
client = mlflow.MlflowClient()
(experiment,) = [e for e in client.search_experiments() if e.name == "vitpipe"]
runs = client.search_runs([experiment.experiment_id])
files = {f.path for run in runs for f in client.list_artifacts(run.info.run_id)}
print(json.dumps({"hosts": answers, "runs": [r.data.tags.get("mlflow.runName") for r in runs],
                  "statuses": [r.info.status for r in runs], "files": sorted(files)}))
"""


class Cluster:
    """Containers made from the pods of a built overlay, in one network namespace."""

    def __init__(self, engine: Any, objects: list[dict[str, Any]], folder: Path) -> None:
        self.engine, self.folder, self.label = engine, folder, uuid.uuid4().hex
        folder.chmod(0o755)
        self.objects = {(item["kind"], item["metadata"]["name"]): item for item in objects}
        self.network = engine.containers.run(
            PLAIN, ["sleep", "900"], detach=True, network_mode="none", labels={"vitpipe.test": self.label},
            extra_hosts=dict.fromkeys(NAMES, "127.0.0.1"), init=True,
        )  # fmt: skip

    def value(self, kind: str, name: str, key: str) -> str:
        text = self.objects[kind, name]["data"][key]
        return base64.b64decode(text).decode() if kind == "Secret" else text

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            found |= self.objects["ConfigMap", source["configMapRef"]["name"]]["data"]
        for variable in container.get("env", ()):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            found[variable["name"]] = (
                self.value("Secret", secret["name"], secret["key"]) if secret else variable["value"]
            )
        return found

    def start(self, kind: str, name: str, *, init: str | None = None) -> Any:
        """A container of the pod: the init container of that name, else the pod's only other one."""
        spec = self.objects[kind, name]["spec"]["template"]["spec"]
        if init:
            (container,) = (c for c in spec["initContainers"] if c["name"] == init)
        else:
            (container,) = spec["containers"]
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        return self.run(
            container["image"], [*container.get("command", ()), *container.get("args", ())],
            entrypoint=[] if container.get("command") else None,
            user="{runAsUser}:{runAsGroup}".format(**spec["securityContext"]),
            read_only=context["readOnlyRootFilesystem"],
            environment=self.environment(container),
            mem_limit=container["resources"]["limits"]["memory"].replace("i", "").lower(),
            volumes=self._volumes(spec, container),
        )  # fmt: skip

    def run(self, image: str, command: list[str], **settings: Any) -> Any:
        """A container of this network without capabilities."""
        settings = {key: value for key, value in settings.items() if value is not None}
        return self.engine.containers.run(
            image, command, detach=True, network_mode=f"container:{self.network.id}", cap_drop=["ALL"],
            security_opt=["no-new-privileges"], labels={"vitpipe.test": self.label}, **settings,
        )  # fmt: skip

    def _volumes(self, spec: dict[str, Any], container: dict[str, Any]) -> dict[str, dict[str, str]]:
        """Folders with what the pod's volumes hold; empty ones, and claims, are writable."""
        by_name = {volume["name"]: volume for volume in spec.get("volumes", ())}
        found: dict[str, dict[str, str]] = {}
        for mount in container["volumeMounts"]:
            volume = by_name.get(mount["name"], {})
            place = self.folder / f"{container['name']}-{mount['name']}-{uuid.uuid4().hex[:6]}"
            place.mkdir()
            place.chmod(0o777)
            if "configMap" in volume:
                for key, text in self.objects["ConfigMap", volume["configMap"]["name"]]["data"].items():
                    (place / key).write_text(text, encoding="utf-8")
            if "secret" in volume:
                for item in volume["secret"]["items"]:
                    text = self.value("Secret", volume["secret"]["secretName"], item["key"])
                    (place / item["path"]).write_text(text, encoding="utf-8")
            found[str(place)] = {"bind": mount["mountPath"], "mode": "ro" if mount.get("readOnly") else "rw"}
        return found

    def close(self) -> None:
        for container in self.engine.containers.list(
            all=True, filters={"label": f"vitpipe.test={self.label}"}
        ):
            container.remove(force=True)


def ended(container: Any) -> str:
    code, log = container.wait(timeout=300)["StatusCode"], container.logs().decode()
    assert code == 0, log
    return log


def until(container: Any, is_ready: Any) -> None:
    deadline = time.monotonic() + 180
    while not is_ready():
        container.reload()
        assert container.status == "running", container.logs().decode()
        assert time.monotonic() < deadline, container.logs().decode()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(built, tmp_path_factory):
    import docker

    objects = built("local")
    try:
        client = docker.from_env()
        for image in (CLIENT, PLAIN, "vitpipe-mlflow:0.1.0", "postgres:17.6-bookworm"):
            client.images.get(image)
    except docker.errors.ImageNotFound as error:
        pytest.skip(f"the Docker engine lacks an image ({error}); docs/cluster.md says how they are built")
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    found = Cluster(client, objects, tmp_path_factory.mktemp("cluster"))
    yield found
    found.close()
    client.close()


def test_stages_log_into_the_tracking_server_of_the_manifest(cluster, tmp_path):
    postgres = cluster.start("StatefulSet", "postgres")
    until(postgres, lambda: postgres.exec_run(["pg_isready", "-h", "127.0.0.1"]).exit_code == 0)
    store = cluster.run(
        PLAIN, [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "8333"],
        volumes={str(p): {"bind": str(p), "mode": "ro"} for p in {Path(sys.prefix), Path(sys.base_prefix)}},
    )  # fmt: skip
    asked = "import boto3; boto3.client('s3').create_bucket(Bucket='vitpipe-mlflow')"
    environment = {
        "AWS_ENDPOINT_URL": cluster.value("ConfigMap", "mlflow-settings", "MLFLOW_S3_ENDPOINT_URL"),
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    time.sleep(5)
    ended(cluster.run("vitpipe-mlflow:0.1.0", ["python", "-c", asked], environment=environment))
    assert store.status != "exited"

    # Both replicas prepare the databases at the same time; a second start finds them current.
    both = [cluster.start("Deployment", "mlflow", init="database") for _ in range(2)]
    assert all("The databases are current" in ended(container) for container in both)
    server = cluster.start("Deployment", "mlflow")
    health = "import urllib.request as u; u.urlopen('http://mlflow:5000/health', timeout=5)"
    until(server, lambda: server.exec_run(["python", "-c", health]).exit_code == 0)

    login = {
        "MLFLOW_TRACKING_URI": "http://mlflow.vitpipe.svc.cluster.local:5000",
        "MLFLOW_TRACKING_USERNAME": cluster.value("Secret", "mlflow-login", "username"),
        "MLFLOW_TRACKING_PASSWORD": cluster.value("Secret", "mlflow-login", "password"),
    }
    tmp_path.chmod(0o777)
    small = [
        word
        for value in (
            "stages=[prepare, pretrain, report]",
            "data.sets=[imagenet]",
            "data.embedded.train_images=40",
        )
        for word in ("--set", value)
    ]
    ended(
        cluster.run(
            CLIENT, ["vitpipe", "run", "prepare", "--recipe", "itpn/pixel_base", "--profile", "demo", *small],
            environment=login, volumes={str(tmp_path): {"bind": "/mnt/run", "mode": "rw"}},
            working_dir="/mnt/run", read_only=True,
        )
    )  # fmt: skip
    answer = json.loads(ended(cluster.run(CLIENT, ["python", "-c", ASK], environment=login)).splitlines()[-1])
    assert answer["statuses"] == ["FINISHED", "FINISHED"]  # the stage's, and its chain's parent
    assert answer["files"]  # through the server, in the object store
    # Nobody is let in without a login, and under no other name.
    assert answer["hosts"]["mlflow:5000"] == 401
    assert answer["hosts"]["mlflow.vitpipe.svc.cluster.local:5000"] == 401
    assert answer["hosts"]["evil.example"] == 403
