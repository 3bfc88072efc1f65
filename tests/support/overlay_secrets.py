"""What `k8s/secrets.sh` asks for where the database and the object store are a cloud's."""

from __future__ import annotations

CLOUD = {
    "DATABASE_HOST": "db.example:5432",
    "DATABASE_PASSWORD": "hunter2Q",
    "STORAGE_ACCESS_KEY": "key",
    "STORAGE_SECRET_KEY": "hunter3Q",
}
