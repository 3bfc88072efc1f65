"""The built images on this machine's Docker engine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("vitpipe-train:0.1.0", "vitpipe-dense:0.1.0")


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """The engine, with both images of this code. Without: skipped, or failed where VITPIPE_IMAGES is `required` (CI)."""
    import docker

    missing = pytest.fail if os.environ.get("VITPIPE_IMAGES") == "required" else pytest.skip
    try:
        client = docker.from_env()
        of_images = {client.images.get(image).labels.get("vitpipe.code-digest") for image in IMAGES}
    except docker.errors.ImageNotFound as error:
        missing(f"the Docker engine lacks an image ({error}): docker/images.sh builds them")
    except docker.errors.DockerException as error:
        missing(f"no Docker engine answers: {error}")
    if of_images != {code_digest(ROOT / "vitpipe")}:
        missing("the images hold other code than this checkout: docker/images.sh builds them anew")
    yield client
    client.close()


def code_digest(package: Path) -> str:
    """As docker/images.sh computes it: names and contents of the package's files."""
    files = sorted(
        "./" + path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    lines = [f"{hashlib.sha256((package / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
