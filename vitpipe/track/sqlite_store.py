"""MLflow's store in a sqlite file: its address for any path, and its first creation in any folder.

SQLAlchemy reads an address as a URL: what follows `?` are options, and `%41` is a letter. MLflow (3.17) puts
the name of the working folder into SQL without escaping it when it creates the tables. Neither may decide in
which folders a run is tracked.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from vitpipe.contracts.address import Address

_SCHEME = "sqlite:///"
# What ends or changes the path of a URL, what `Address` takes for a parameter with a password, and what would
# break a line. Spaces, quotes and letters of all languages stay readable.
_ESCAPED = re.compile(r"[%?#&;=\x00-\x1f\x7f]")
_SECONDS = 15.0  # to wait for another process that writes


def sqlite_address(file: Path) -> Address:
    """The address of a sqlite file."""
    return Address(_SCHEME + _ESCAPED.sub(lambda found: f"%{ord(found[0]):02X}", str(file)))


def sqlite_file(address: Address) -> Path | None:
    """The file of a sqlite address, as SQLAlchemy reads it; None for other addresses and other forms."""
    scheme, _, path = address.secret.partition(_SCHEME)
    if scheme or not path or path.startswith((":memory:", "file:")):
        return None
    return Path(unquote(path.partition("?")[0]))


def is_escaped(address: Address) -> bool:
    """Whether the path of a sqlite file is written otherwise in its address."""
    return sqlite_file(address) not in (None, _as_written(address))


def _as_written(address: Address) -> Path:
    return Path(address.secret.removeprefix(_SCHEME).partition("?")[0])


def artifact_location(file: Path) -> str:
    """URI of the folder for artifacts beside a sqlite file."""
    return (file.resolve().parent / "mlartifacts").as_uri()


@contextmanager
def new_store(address: Address) -> Iterator[None]:
    """Create MLflow's tables in a sqlite file that lacks them, one process at a time; others do nothing.

    Held around the opening of the store: of two stages that start on a new file, one would fail.

    Raises:
        OSError: the folder or the lock beside the file cannot be written.
        sqlite3.Error: the file is no database, or cannot be opened.
    """
    file = sqlite_file(address)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as handle, _without_stray_folders(address):
        fcntl.flock(handle, fcntl.LOCK_EX)
        # sqlite itself says at once what is wrong with a file; MLflow would try for minutes.
        if not _has_default_experiment(file):
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            # MLflow's default experiment gets its artifacts below the working folder, and that name goes into
            # SQL as Python writes it: a folder with two kinds of quotes ends the statement. A URI has none.
            SqlAlchemyStore(address.secret, artifact_location(file))
        yield


def _has_default_experiment(file: Path) -> bool:
    with contextlib.closing(sqlite3.connect(file, timeout=_SECONDS)) as database:
        try:
            asked = "select 1 from experiments where experiment_id = 0"
            return database.execute(asked).fetchone() is not None
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return False
            raise


@contextmanager
def _without_stray_folders(address: Address) -> Iterator[None]:
    """Remove the empty folders that MLflow makes for the escaped path of an address beside the real one."""
    # `_make_parent_dirs_if_sqlite` of mlflow/store/db/utils.py (3.17) makes the path's folders as it is
    # written in the address.
    above = _as_written(address).parents if is_escaped(address) else ()
    folders = [folder for folder in above if not folder.exists()]
    try:
        yield
    finally:
        for folder in folders:  # the innermost first; one that is not empty stays
            with contextlib.suppress(OSError):
                folder.rmdir()
