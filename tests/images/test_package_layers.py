"""Which packages an image has: the committed lists are those of the lock and of what the stages need."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker/package_layers.py"
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def layers():
    spec = importlib.util.spec_from_file_location("package_layers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(*words: str) -> str:
    """Without any package, as in the image that has none yet."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def names(lines: str) -> list[str]:
    return re.findall(r"^([A-Za-z0-9_.-]+)==", lines, flags=re.MULTILINE)


def test_the_lists_are_current(layers):
    """After a change of pyproject.toml: make lock, make setup, python docker/package_layers.py --write."""
    assert layers.layers() == {name: layers.names_of(name) for name in layers.ROOTS}


def test_no_package_is_in_two_layers_of_one_image(layers):
    stacked = [package for layer in ("torch", "train", "dense") for package in layers.names_of(layer)]
    assert len(stacked) == len(set(stacked))
    assert {"torch", "torchvision", "nvidia-nccl-cu13"} <= set(layers.names_of("torch"))
    assert {"onedl-mmdetection", "onedl-mmsegmentation"} <= set(layers.names_of("dense"))
    assert "kubernetes" in layers.names_of("train")


@pytest.mark.parametrize(
    "package", ["kfp", "pytest", "hypothesis", "moto", "mypy", "ruff", "uv", "pip", "hatchling"]
)
def test_no_image_has_tools_of_development(layers, package):
    assert not any(package in layers.names_of(layer) for layer in layers.ROOTS)


def test_the_server_has_no_torch(layers):
    server = set(layers.names_of("mlflow"))
    assert {"mlflow", "psycopg", "psycopg-binary", "boto3", "flask-wtf"} <= server
    assert not server & {"torch", "timm", "numba", "dvc"}


def test_a_layer_is_written_with_the_hashes_of_the_lock(layers):
    lines = said("torch", "train")
    assert sorted(names(lines)) == sorted(layers.names_of("torch") + layers.names_of("train"))
    assert lines.count("--hash=sha256:") >= len(names(lines))


def test_torch_for_a_processor_alone(layers):
    versions = said("--cpu-torch").split()
    assert [version.split("==")[0] for version in versions] == ["torch", "torchvision"]
    rest = names(said("--cpu-rest"))
    assert not [
        n for n in rest if n in ("torch", "torchvision") or n.startswith(("nvidia-", "cuda-", "triton"))
    ]
    assert set(rest) < set(layers.names_of("torch"))


def test_the_engine_is_sent_what_is_copied_and_nothing_else():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert "*" in ignored
    assert sent == copied
    assert all((ROOT / source).exists() for source in copied)


def test_the_file_needs_no_registry_for_its_syntax():
    # A syntax line is fetched; heredocs need it.
    assert "# syntax" not in DOCKERFILE
    assert "<<" not in DOCKERFILE
    # Fixed tags, and nobody is root at the end.
    assert not re.search(r":latest|^FROM \S+(?<!\})$(?<=@)", DOCKERFILE, flags=re.MULTILINE)
    for image in ("stages", "mlflow"):
        stage = DOCKERFILE.split(f" AS {image}\n")[1].split("\nFROM ")[0]
        assert "\nUSER 1000:1000\n" in stage
        assert "\nENTRYPOINT" not in stage
