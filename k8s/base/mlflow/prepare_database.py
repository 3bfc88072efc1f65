"""Make or upgrade MLflow's two databases before the server starts: runs, and logins.

Replicas start at the same time, and MLflow's migrations do not wait for each other: an advisory lock of
Postgres lets one after the other in. The second finds nothing to do.
"""

import os

import psycopg
from mlflow.server.auth.db.utils import migrate
from mlflow.store.db.utils import _initialize_tables, _upgrade_db
from psycopg import sql
from sqlalchemy import create_engine, inspect, make_url

LOCK = 3_217_846_051  # any number that nothing else in this database locks


def main() -> None:
    """Upgrade both databases under the lock."""
    runs, logins = os.environ["MLFLOW_BACKEND_STORE_URI"], os.environ["MLFLOW_AUTH_DATABASE_URI"]
    address = runs.replace("postgresql+psycopg://", "postgresql://")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        make_if_missing(connection, str(make_url(logins).database))
        engine = create_engine(runs)
        # MLflow's migrations begin with tables that its first version made without any.
        if not inspect(engine).has_table("experiments"):
            _initialize_tables(engine)
        _upgrade_db(engine)
        migrate(create_engine(logins), "head")
    print("The databases are current")


def make_if_missing(connection: psycopg.Connection, name: str) -> None:
    """Create a database on the same server, where the user may; a managed Postgres has it already."""
    if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone():
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


if __name__ == "__main__":
    main()
