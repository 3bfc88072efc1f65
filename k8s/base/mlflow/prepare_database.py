"""Make or upgrade MLflow's two databases before the server starts: runs, and logins.

Replicas start at the same time, and MLflow's migrations do not wait for each other: an advisory lock of
Postgres lets one after the other in. The second finds nothing to do.
"""

import os

import psycopg
from mlflow.server.auth.db.utils import migrate
from mlflow.store.db.utils import _initialize_tables, _upgrade_db
from sqlalchemy import create_engine, inspect

LOCK = 3_217_846_051  # any number that nothing else in this database locks


def main() -> None:
    """Upgrade both databases under the lock."""
    runs, logins = os.environ["MLFLOW_BACKEND_STORE_URI"], os.environ["MLFLOW_AUTH_DATABASE_URI"]
    with psycopg.connect(runs.replace("postgresql+psycopg://", "postgresql://")) as lock:
        lock.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        engine = create_engine(runs)
        # MLflow's migrations begin with tables that its first version made without any.
        if not inspect(engine).has_table("experiments"):
            _initialize_tables(engine)
        _upgrade_db(engine)
        migrate(create_engine(logins), "head")
    print("The databases are current")


if __name__ == "__main__":
    main()
