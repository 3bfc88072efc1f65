"""The overlays of k8s/ as the real kubectl builds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from overlay_secrets import CLOUD

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def kubectl() -> str:
    """The program; skipped without, failed where VITPIPE_KUBECTL is `required` (CI)."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if found := shutil.which("kubectl", path=path):
        return found
    missing = pytest.fail if os.environ.get("VITPIPE_KUBECTL") == "required" else pytest.skip
    missing("there is no kubectl: `make kubectl` fetches it")
    raise AssertionError


@pytest.fixture(scope="session")
def manifests(tmp_path_factory) -> Path:
    """A copy of k8s/, into which secrets may be written."""
    folder = tmp_path_factory.mktemp("manifests") / "k8s"
    shutil.copytree(ROOT / "k8s", folder, ignore=shutil.ignore_patterns("secrets"))
    return folder


@pytest.fixture(scope="session")
def built(kubectl, manifests):
    """Overlay -> its objects, each overlay built once."""
    found: dict[str, list[dict[str, Any]]] = {}

    def objects(name: str) -> list[dict[str, Any]]:
        if name not in found:
            overlay = manifests / "overlays" / name
            subprocess.run(
                ["sh", str(manifests / "secrets.sh"), str(overlay)],
                env={**os.environ, **({} if name == "local" else CLOUD)},
                check=True,
                capture_output=True,
            )
            done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""  # kustomize warns of fields that it will drop
            found[name] = [document for document in yaml.safe_load_all(done.stdout) if document]
        return found[name]

    return objects
