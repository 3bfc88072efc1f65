"""Files of the user's that a stage's section names: starting weights, and what its method reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitpipe.config.method import MethodConfig
from vitpipe.config.recipe import Recipe

WEIGHTS = "weights"


def own_files(recipe: Recipe, stage: str) -> dict[str, Path]:
    """Key in the stage's section, such as `weights` or `method.teacher.file` -> the file."""
    section = getattr(recipe, stage, None)
    weights: Path | None = getattr(section, WEIGHTS, None)
    found = {} if weights is None else {WEIGHTS: weights}
    method = getattr(section, "method", None)
    if isinstance(method, MethodConfig):
        found |= {f"method.{key}": path for key, path in method.files().items()}
    return found


def without_keys(values: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """A section's plain values without those at dotted keys."""
    kept = {}
    for key, value in values.items():
        if key in keys:
            continue
        inner = {name.removeprefix(f"{key}.") for name in keys if name.startswith(f"{key}.")}
        kept[key] = without_keys(value, inner) if inner and isinstance(value, Mapping) else value
    return kept
