"""A run is tracked in a folder of any name; a sqlite file that cannot be used is one clear error."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.address import Address
from vitpipe.track.delivery import Delivery
from vitpipe.track.journal import Journal
from vitpipe.track.mlflow_errors import TrackingError
from vitpipe.track.server import connect, experiment_id, store_address
from vitpipe.track.sqlite_store import sqlite_address, sqlite_file
from vitpipe.track.stage_run import stage_run
from vitpipe.track.sync import sync_pending
from vitpipe.track.ui_address import ui_lines

# What ends a statement of SQL, names a parameter of it, ends the path of a URL or is an escape in it, and what
# hides a password.
NAMES = ('it\'s "my" folder :x', "50%41?mode=ro&key=a #é\nline")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Goes into a new folder of a name; no store is named."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def go(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        return folder

    return go


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_store_is_made_in_a_folder_of_any_name(here, tmp_path, new_outbox, name):
    folder = here(name)
    (tmp_path / "file.txt").write_text("hello")
    address = store_address(folder)
    client = connect(address)
    run = client.create_run(experiment_id(client, address, "vitpipe"))
    client.log_artifact(run.info.run_id, str(tmp_path / "file.txt"))
    assert [found.path for found in client.list_artifacts(run.info.run_id)] == ["file.txt"]
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlflow.db.lock", "mlartifacts"}
    # An outbox keeps the address as a text, and is sent by a later process from there.
    outbox = new_outbox(str(address))
    journal = Journal(outbox.journal)
    journal.status("RUNNING")
    journal.points({"loss": 0.5}, 1)
    journal.commit()
    Delivery(outbox).sync()
    assert client.get_run(outbox.run_id).data.metrics["loss"] == 0.5
    assert {path.name for path in tmp_path.iterdir()} == {name, "file.txt", ".pretrain.state"}


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
def test_an_address_is_read_as_it_was_written(name):
    from sqlalchemy.engine import make_url

    file = Path("/somewhere") / name / "mlflow.db"
    address = sqlite_address(file)
    assert sqlite_file(address) == file
    assert make_url(address.secret).database == str(file)
    assert str(address) == address.secret, "nothing of a folder's name is hidden as a password"
    assert not {"\n", "\r", "\t"} & set(address.secret), "it stays in one line"


def test_other_addresses_are_no_sqlite_files():
    for text in ("http://host:5000", "sqlite:///:memory:", "sqlite://", "sqlite:///file:x?uri=true", "off"):
        assert sqlite_file(Address(text)) is None
    assert sqlite_file(Address("sqlite:///mine.db?timeout=9")) == Path("mine.db")


def test_the_shown_command_opens_that_file(here, monkeypatch):
    folder = here("50% ?")
    file = folder / "a?b" / "mlflow.db"
    assert ui_lines(sqlite_address(file))[0].endswith("sqlite:///a%3Fb/mlflow.db")
    # As people write it: below the working folder, wherever that is.
    assert ui_lines(Address("sqlite:///mlflow.db"))[0].endswith("sqlite:///mlflow.db")


def _is_a_folder(file: Path) -> None:
    file.mkdir()


def _has_other_tables(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("create table experiments (experiment_id integer)")


@pytest.mark.parametrize("spoil", [_is_a_folder, _has_other_tables])
def test_a_file_that_cannot_be_used_is_told_with_its_path_and_the_ways_out(
    here, new_outbox, tmp_path, capfd, spoil
):
    folder = here("it's")
    spoil(folder / "mlflow.db")
    outbox = new_outbox(str(store_address(folder)))
    journal = Journal(outbox.journal)
    journal.status("FINISHED")
    journal.close()
    with pytest.raises(TrackingError, match="MLflow's database cannot be opened") as caught:
        sync_pending(tmp_path)
    assert str(folder / "mlflow.db") in caught.value.fix
    assert "another folder" in caught.value.fix
    assert "MLFLOW_TRACKING_URI" in caught.value.fix
    assert "server's log" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_stage_goes_on_where_the_file_cannot_be_used(here, recipe, capsys):
    folder = here("it's")
    (folder / "mlflow.db").mkdir()
    out = folder / "out"
    out.mkdir()
    with stage_run(stage="pretrain", recipe=recipe, folder=out, state=folder / ".out.state") as logger:
        logger.metrics({"train/loss": 0.5}, 1)
        logger.commit(1)
    said = capsys.readouterr().out
    assert "MLflow's database cannot be opened" in said
    assert "work in another folder, or set MLFLOW_TRACKING_URI" in said
    assert list((folder / ".out.unsent").iterdir())
