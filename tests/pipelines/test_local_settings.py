"""What containers get of this machine: the one MLflow store, variables by name, mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.local_settings import CHECKOUT, Store, container_settings, passed_on, tracking_store
from vitpipe.contracts.address import Address
from vitpipe.contracts.errors import InputError
from vitpipe.track.server import OFF
from vitpipe.track.sqlite_store import sqlite_file


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """An environment without anything of MLflow, AWS and the network."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "AWS_", "VITPIPE_", "REQUESTS_", "SSL_")) or name.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def settings_of(folder, store, **more):
    given = {"data": None, "shm_gib": 2, "memory_gib": None, "development": False, **more}
    return container_settings(folder, store, **given)


def test_all_runs_share_one_store(tmp_path):
    store = tracking_store(tmp_path)
    assert sqlite_file(store.address) == tmp_path / "mlflow" / "mlflow.db"
    settings = settings_of(tmp_path / "run", store)
    assert settings["environment"]["MLFLOW_TRACKING_URI"] == str(store.address)
    assert set(settings["volumes"]) == {str(tmp_path / "run"), str(tmp_path / "mlflow")}
    assert all(Path(place).is_dir() for place in settings["volumes"])
    assert "network_mode" not in settings


def test_tracking_may_be_off(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPIPE_TRACKING", "off")
    store = tracking_store(tmp_path)
    assert store == Store(OFF)
    settings = settings_of(tmp_path / "run", store)
    assert "MLFLOW_TRACKING_URI" not in settings["environment"]
    assert settings["environment"]["VITPIPE_TRACKING"] == "off"


@pytest.mark.parametrize(
    "address", ["https://me:hunter2@mlflow.example", "postgresql://me:hunter2@db/mlflow"]
)
def test_a_server_is_reached_over_the_network_of_this_machine(tmp_path, monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    store = tracking_store(tmp_path)
    assert store.folder is None
    assert "hunter2" not in str(store.address)
    settings = settings_of(tmp_path / "run", store)
    assert settings["environment"]["MLFLOW_TRACKING_URI"] == address
    assert settings["network_mode"] == "host"


def test_a_sqlite_file_elsewhere_is_mounted_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///stores/mine.db")
    store = tracking_store(tmp_path / "runs")
    assert sqlite_file(store.address) == tmp_path / "stores" / "mine.db"
    assert str(tmp_path / "stores") in settings_of(tmp_path / "run", store)["volumes"]


@pytest.mark.parametrize(
    "address",
    [
        f"sqlite:///{CHECKOUT}/mlflow.db",
        f"sqlite:///{Path.home()}/mlflow.db",
        "sqlite:////mlflow.db",
        "sqlite:///:memory:",
        "file:///elsewhere/mlruns",
        "/elsewhere/mlruns",
        "mlruns",
    ],
)
def test_a_store_that_would_be_lost_with_the_container_is_refused(tmp_path, monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(InputError, match="MLflow store") as caught:
        tracking_store(tmp_path)
    assert caught.value.where == "MLFLOW_TRACKING_URI"
    assert "lost with" in caught.value.what


def test_variables_are_passed_on_and_named_without_their_values(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    (home / ".aws" / "credentials").write_text("[me]\n", encoding="utf-8")
    certificate = tmp_path / "ca.pem"
    certificate.write_text("", encoding="utf-8")
    monkeypatch.setenv("HOME", str(home))
    given = {
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "hunter2",
        "MLFLOW_TRACKING_TOKEN": "hunter3",
        "MLFLOW_EXPERIMENT_NAME": "mine",
        "AWS_ACCESS_KEY_ID": "hunter4",
        "AWS_SECRET_ACCESS_KEY": "hunter5",
        "AWS_PROFILE": "me",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("UNRELATED_PASSWORD", "hunter6")
    settings = settings_of(tmp_path / "run", Store(Address(given["MLFLOW_TRACKING_URI"])))
    assert given.items() <= settings["environment"].items()
    assert {"MLFLOW_RUN_ID", "UNRELATED_PASSWORD"}.isdisjoint(settings["environment"])
    assert settings["environment"]["AWS_SHARED_CREDENTIALS_FILE"] == str(home / ".aws" / "credentials")
    assert "AWS_CONFIG_FILE" not in settings["environment"]
    mounted = {mount["Source"] for mount in settings["mounts"]}
    assert mounted == {str(home / ".aws" / "credentials"), str(certificate)}
    names = passed_on(settings)
    assert {"MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE"} <= set(names)
    assert "hunter" not in " ".join(names)


def test_an_object_store_on_this_machine_is_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    assert settings_of(tmp_path / "run", tracking_store(tmp_path))["network_mode"] == "host"


def test_no_folder_is_mounted_twice(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    settings = settings_of(tmp_path / "run", Store(OFF), data=data, imports=[data], development=True)
    places = [mount["Target"] for mount in settings["mounts"]]
    assert len(places) == len(set(places))
    assert str(CHECKOUT) in places
