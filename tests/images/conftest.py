"""The built images on this machine's Docker engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

IMAGES = ("vitpipe-train:0.1.0", "vitpipe-dense:0.1.0")


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """The engine, with both images. Without: skipped, or failed where VITPIPE_IMAGES is `required` (CI)."""
    import docker

    missing = pytest.fail if os.environ.get("VITPIPE_IMAGES") == "required" else pytest.skip
    try:
        client = docker.from_env()
        for image in IMAGES:
            client.images.get(image)
    except docker.errors.ImageNotFound as error:
        missing(f"the Docker engine lacks an image ({error}): docker/images.sh builds them")
    except docker.errors.DockerException as error:
        missing(f"no Docker engine answers: {error}")
    yield client
    client.close()
