"""Identity: one digest per stage, by which DVC and Kubeflow both decide what runs again.

A stage's identity is the recipe sections that it reads, the code that decides its result, and its
image. The data enters through the digests of its input folders. Anything else may change freely.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vitpipe.config.recipe import Recipe

PACKAGE = Path(__file__).parent.parent
# Keys that change how fast a run goes, or whether its result is accepted, not what comes out.
_NOT_IN_RESULT = {"workers", "checkpoint_minutes", "max_corrupt_images"}
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "mlflow", "dvc")
_DENSE_LIBRARIES = (
    "onedl-mmcv",
    "onedl-mmengine",
    "onedl-mmdetection",
    "onedl-mmsegmentation",
    "faster-coco-eval",
)


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value or pydantic model; key order does not matter."""
    # JSON with sorted keys: equal values give equal digests whatever the order in the YAML file.
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def code_digest(places: Iterable[str]) -> str:
    """Hex SHA-256 over the Python, YAML and template files below `places` of the package.

    Args:
        places: files or folders relative to `vitpipe/`.
    """
    total = hashlib.sha256()
    for place in sorted(places):
        root = PACKAGE / place
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if _is_source(p))
        for file in files:
            # The name, too: a file that moves changes what is imported.
            total.update(str(file.relative_to(PACKAGE)).encode())
            total.update(file.read_bytes())
    return total.hexdigest()


def recipe_sections(recipe: Recipe, sections: Iterable[str]) -> dict[str, Any]:
    """The named top-level parts of a recipe as plain values, without keys that do not decide its result."""
    plain = recipe.model_dump(mode="json")
    return {name: _of_the_result(plain[name]) for name in sections}


def stage_identity(
    recipe: Recipe, *, stage: str, sections: Iterable[str], code: Iterable[str], image: str
) -> dict[str, str]:
    """What decides one stage: digests of recipe sections, code, image, libraries, and of all together."""
    parts = {
        "stage": stage,
        "recipe_digest": digest_of(recipe_sections(recipe, sections)),
        "code_digest": code_digest(code),
        "image": image,
        "libraries": digest_of(library_versions(dense=image == "dense")),
    }
    return {**parts, "identity": digest_of(parts)}


@functools.cache
def library_versions(dense: bool = False) -> dict[str, str]:
    """Installed versions of the libraries that can change a number."""
    names = (*_LIBRARIES, *_DENSE_LIBRARIES) if dense else _LIBRARIES
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def hardware() -> dict[str, str | int | float]:
    """Processor, cores this process may use, and memory in GiB."""
    # The node's memory, not the limit of a container: what a card names is the machine.
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
    }


@functools.cache
def git_commit() -> str:
    """The commit of the code, with `+changes` when files differ from it; `unknown` outside git."""
    try:
        # Untracked files do not count: artifacts and MLflow's database lie in the checkout, too.
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def _is_source(path: Path) -> bool:
    return path.is_file() and path.suffix in (".py", ".yaml", ".html", ".css", ".j2", ".txt")


def _of_the_result(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _of_the_result(inner) for key, inner in value.items() if key not in _NOT_IN_RESULT}
    return value
