"""Identity: one digest per stage, by which DVC and Kubeflow both decide what runs again.

A stage's identity is the recipe sections that it reads, the code that decides its result, the libraries that
this code computes with, and its image. The data enters through the digests of its input folders. Anything
else may change freely.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.discovery import PACKAGE, plugin_folders
from vitpipe.contracts.files import require_regular
from vitpipe.contracts.git import ask_git

# What decides a result: the package, and the two packages beside it that call it. Not params.yaml, dvc.yaml
# or docs/, which every user edits.
_CODE_FOLDERS = (".", "../components", "../pipelines")
COMMIT_VARIABLE = "VITPIPE_COMMIT"


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value or pydantic model; key order does not matter."""
    # JSON with sorted keys: equal values give equal digests whatever the order in the YAML file.
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises OSError where it cannot be read or is no regular file."""
    require_regular(path)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_fingerprint(path: Path) -> str:
    """Size and modification time of a file, or `absent`: cheap to compare for gigabytes of weights."""
    try:
        status = path.stat()
    except OSError:
        return "absent"
    return f"{status.st_size} {status.st_mtime_ns}"


def recipe_sections(
    recipe: Recipe, sections: Iterable[str], *, on_weights_only: bool = False
) -> dict[str, Any]:
    """The named top-level parts of a recipe as plain values, without keys that do not decide its result.

    Args:
        on_weights_only: leave out keys that only decide what is measured (`Section.effects`).
    """
    acting, plain = recipe.acting(on_weights_only=on_weights_only), recipe.model_dump(mode="json")
    # A whole section whose key only decides figures, such as `evaluate`, is still what its own stage reads.
    return {name: acting.get(name, plain[name]) for name in sections}


def recipe_digest(recipe: Recipe, sections: Iterable[str], values: Mapping[str, str]) -> str:
    """Hex SHA-256 over what a recipe says of a stage, as its card has it.

    Args:
        values: what the recipe chooses by name and that enters by value.
    """
    return digest_of({**recipe_sections(recipe, sections), "chosen": dict(values)})


def stage_identity(
    recipe: Recipe,
    *,
    stage: str,
    sections: Iterable[str],
    image: str,
    code: str,
    libraries: Mapping[str, str],
    values: Mapping[str, str],
) -> dict[str, str]:
    """What decides one stage: digests of recipe sections, code, image, libraries, and of all together.

    Args:
        code: as `code_identity.code_digest`.
        libraries: as `libraries.deciding_libraries`.
        values: what the recipe chooses by name and that enters by value.
    """
    parts = {
        "stage": stage,
        "recipe_digest": recipe_digest(recipe, sections, values),
        "code_digest": code,
        "image": image,
        "libraries": digest_of(dict(libraries)),
    }
    return {**parts, "identity": digest_of(parts)}


@functools.cache
def git_commit() -> str:
    """The commit of the code, with `+changes` when code differs from it; `unknown` outside git.

    An image has no repository: it names its commit in `VITPIPE_COMMIT`.
    """
    try:
        head = ask_git(PACKAGE, "rev-parse", "HEAD")
        # New files count: one that is imported decides as much as one that is edited.
        changed = ask_git(PACKAGE, "status", "--porcelain", "--untracked-files=all", "--", *_code_folders())
        return f"{head}+changes" if changed or any(map(_is_changed, plugin_folders())) else head
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(COMMIT_VARIABLE) or "unknown"


def _code_folders() -> list[str]:
    # An installed package has nothing beside it, and git refuses the names of folders outside its repository.
    return [folder for folder in _CODE_FOLDERS if (PACKAGE / folder).is_dir()]


def _is_changed(plugin: Path) -> bool:
    """Whether a plugin has files that its own repository does not hold; without one, nobody can tell."""
    try:
        return bool(ask_git(plugin, "status", "--porcelain", "--untracked-files=all", "--", "."))
    except subprocess.CalledProcessError:
        return False
