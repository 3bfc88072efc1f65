"""Fixtures of the tracking tests: MLflow stores, outboxes, the demo recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow_servers import real_server

from vitpipe.config.read import load_recipe
from vitpipe.track.outbox import Origin, Outbox
from vitpipe.track.server import connect


# Creating the tables of an MLflow database takes seconds; copying the file takes none.
@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{file}")
    return file


@pytest.fixture
def store(_empty_store, tmp_path, monkeypatch) -> str:
    """Tracking URI of an empty sqlite store of this test."""
    (tmp_path / "store").mkdir()
    file = Path(shutil.copy(_empty_store, tmp_path / "store" / "mlflow.db"))
    address = f"sqlite:///{file}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture
def client(store):
    """An MLflow client of that store."""
    return connect(store)


@pytest.fixture(scope="session")
def server_port(tmp_path_factory):
    """Port of a real MLflow server without authentication."""
    # One for all tests, because it takes long to start.
    with real_server(tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.fixture(scope="session")
def recipe():
    """The demo recipe."""
    return load_recipe("itpn/pixel_base", "demo")


@pytest.fixture
def new_outbox(tmp_path):
    """Function that creates an outbox for a stage without starting an uploader."""

    def make(store: str, stage: str = "pretrain", **values) -> Outbox:
        outbox = Outbox(tmp_path / f".{stage}.state" / "track")
        outbox.open(
            Origin(
                store=store, experiment="vitpipe", pipeline="p", pipeline_title="P", stage=stage,
                params={"pretrain.epochs": "3"}, pipeline_params={"seed": "0"},
                tags={"data_digest": "d" * 64, "git_commit": "abc+changes"},
            ).model_copy(update=values)
        )  # fmt: skip
        return outbox

    return make


@pytest.fixture(autouse=True)
def _tracking_is_on(monkeypatch):
    """Switch tracking on; tests/conftest.py switches it off for all other tests."""
    monkeypatch.delenv("VITPIPE_TRACKING", raising=False)
