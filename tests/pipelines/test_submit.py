"""Submission against a double of the v2beta1 API: what is sent, and that the real state comes back."""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.compile import compile_pipeline
from pipelines.endpoint import Endpoint, Login
from pipelines.submit import submit
from vitpipe.contracts.errors import EngineError, InputError

pytestmark = pytest.mark.slow


def send(package, double, **options):
    return submit(package.path, double.endpoint, poll_seconds=0.01, **options)


def test_the_package_is_uploaded_and_a_run_started(package, kfp_api):
    done = send(package, kfp_api, arguments={"overrides": ["seed=5"]}, service_account="trainer")
    assert done.state == "PENDING"
    assert done.url == f"{kfp_api.endpoint}/#/runs/details/{done.run_id}"
    (run,) = kfp_api.runs
    assert run["runtime_config"]["parameters"] == {"overrides": ["seed=5"]}
    assert run["service_account"] == "trainer"
    assert run["display_name"].startswith("itpn-pixel-base-demo ")
    assert [e["display_name"] for e in kfp_api.experiments] == ["vitpipe"]
    sent = kfp_api.versions[0]["pipeline_spec"]["pipeline_spec"]
    assert sent == next(yaml.safe_load_all(package.path.read_text(encoding="utf-8")))


def test_the_same_package_is_one_version_and_another_is_a_second(package, kfp_api, tmp_path):
    for _ in range(3):
        send(package, kfp_api)
    assert len(kfp_api.pipelines) == 1
    assert len(kfp_api.experiments) == 1
    known = len(kfp_api.versions)
    send(package, kfp_api)
    assert len(kfp_api.versions) == known
    other = compile_pipeline("itpn/pixel_base", "demo", ["seed=9"], tmp_path / "other.yaml")
    done = send(other, kfp_api)
    assert len(kfp_api.versions) == known + 1
    assert done.version_id == kfp_api.versions[-1]["pipeline_version_id"]


def test_waiting_brings_the_end_back(package, kfp_api):
    kfp_api.states = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    assert send(package, kfp_api, wait=True).state == "SUCCEEDED"
    assert kfp_api.polls == 3


@pytest.mark.parametrize("state", ["FAILED", "CANCELED", "SKIPPED"])
def test_a_run_that_did_not_succeed_is_an_error(package, kfp_api, state):
    kfp_api.states, kfp_api.error = ["PENDING", state], "pretrain: out of memory"
    with pytest.raises(EngineError, match=f"ended as {state}: pretrain: out of memory") as caught:
        send(package, kfp_api, wait=True)
    assert caught.value.exit_code == 1
    assert kfp_api.endpoint in caught.value.where


def test_waiting_has_an_end(package, kfp_api):
    kfp_api.states = ["RUNNING"]
    with pytest.raises(EngineError, match="not ended within"):
        send(package, kfp_api, wait=True, timeout_hours=1e-6)


def test_a_refusal_is_one_paragraph(package, kfp_api):
    kfp_api.refuse_runs = True
    with pytest.raises(EngineError, match="400 Bad Request: quota exceeded") as caught:
        send(package, kfp_api)
    assert "\n" not in str(caught.value)


def test_a_token_is_asked_for_and_used(package, kfp_api):
    kfp_api.token = "secret"
    with pytest.raises(EngineError, match="HTTP status 401") as caught:
        send(package, kfp_api)
    assert "KFP_TOKEN" in caught.value.fix
    assert send(package, kfp_api, login=Login(token="secret")).run_id == "r0"


def test_user_and_password_are_sent_and_shown_nowhere(package, kfp_api):
    kfp_api.authorization = "Basic " + base64.b64encode(b"me:hunter2/x").decode()
    with pytest.raises(EngineError, match="HTTP status 401") as caught:
        send(package, kfp_api)
    address = kfp_api.endpoint.replace("http://", "http://me:hunter2%2Fx@")
    done = submit(package.path, address, poll_seconds=0.01)
    assert done.url == f"{kfp_api.endpoint}/#/runs/details/{done.run_id}"
    kfp_api.states = ["FAILED"]
    with pytest.raises(EngineError, match="ended as FAILED") as caught:
        submit(package.path, address, poll_seconds=0.01, wait=True)
    kfp_api.refuse_runs = True
    with pytest.raises(EngineError, match="quota exceeded") as refused:
        submit(package.path, address)
    for text in (repr(done), str(caught.value), str(refused.value), repr(Endpoint.of(address))):
        assert "hunter2" not in text
        assert "bWU6" not in text  # the same in base64


@pytest.mark.parametrize(
    "endpoint",
    [
        "localhost:8080",
        "ftp://host",
        "http://",
        "http://me:hunter2/x@host",
        "http://host/?token=hunter2",
        "http://a b",
    ],
)
def test_what_is_no_endpoint_is_refused(package, endpoint):
    with pytest.raises(InputError, match="not an API address") as caught:
        submit(package.path, endpoint)
    assert "hunter2" not in str(caught.value)


def test_a_token_and_a_password_are_too_much(package):
    with pytest.raises(InputError, match="Both a bearer token and credentials") as caught:
        submit(package.path, "http://me:hunter2@127.0.0.1:9", login=Login(token="hunter3"))
    assert "hunter" not in str(caught.value)


def test_wrong_arguments_are_refused_before_anything_is_sent(package, kfp_api):
    with pytest.raises(InputError, match="no parameter 'sed'"):
        send(package, kfp_api, arguments={"sed": 1})
    assert not kfp_api.pipelines


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_unreachable_endpoint(package):
    with pytest.raises(EngineError, match="cannot be reached") as caught:
        submit(package.path, f"http://127.0.0.1:{free_port()}")
    assert "port-forward" in caught.value.fix


def test_something_else_answers(package, kfp_api):
    with pytest.raises(EngineError, match="HTTP status 404"):
        submit(package.path, f"{kfp_api.endpoint}/elsewhere")


def test_kubeflows_own_command_takes_the_same_package(package, kfp_api):
    kfp_api.experiments.append({"experiment_id": "e0", "display_name": "vitpipe"})
    command = [Path(sys.executable).parent / "kfp", "--endpoint", kfp_api.endpoint, "run", "create"]
    command += ["--experiment-name", "vitpipe", "--package-file", package.path, 'overrides=["seed=3"]']
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert kfp_api.runs[0]["runtime_config"]["parameters"] == {"overrides": ["seed=3"]}


def test_the_verb_exits_with_one_for_a_failed_run(package, kfp_api):
    kfp_api.states = ["FAILED"]
    command = [sys.executable, "-m", "vitpipe", "submit", "--package", str(package.path)]
    command += ["--endpoint", kfp_api.endpoint, "--wait"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vitpipe: The run ended as FAILED.")
    assert "Traceback" not in done.stderr
