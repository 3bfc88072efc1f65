"""Which run of the chain a stage belongs to, so that MLflow shows one parent for each.

A run of the chain is one `dvc repro`, or one pipeline run, that executes at least one stage. Its key lies in
`artifacts/RECIPE/PROFILE/.chain.json`, which no stage reads and DVC does not hash. `vitpipe identity`, which
every `dvc repro` runs first, writes a new one where the run before it is complete; an unfinished run keeps
its key, whatever is corrected in its recipe meanwhile. Stages run by hand into one folder share a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import disk_errors
from vitpipe.contracts.files import write_whole
from vitpipe.contracts.graph import graph_of
from vitpipe.stages.identity import folders_of, identity_file, why_it_runs

KEY_VARIABLE = "VITPIPE_PIPELINE"
_FILE = ".chain.json"


def begin_chain(recipe: Recipe, run: Path) -> None:
    """Write a new key if the last run of the chain is complete, or was of another seed.

    To be called before the identities of this run replace those of the last one, by which it is judged.

    Args:
        run: the run's folder, see `vitpipe.config.read.run_folder`.
    """
    known = _read(run / _FILE)
    if known.get("key") and known.get("seed") == recipe.seed and not _is_complete(recipe, run):
        return
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    write_whole(run / _FILE, json.dumps({"key": uuid.uuid4().hex, "seed": recipe.seed}) + "\n")


def chain_key(recipe: Recipe, out: Path, place: str = "") -> str:
    """The key that MLflow finds the chain's run by.

    Args:
        out: the stage's output folder.
        place: of a pipeline run, where all of its outputs lie; empty for a stage that Kubeflow did not start.
    """
    if given := os.environ.get(KEY_VARIABLE):
        return given
    folder = out.resolve().parent
    key = "" if place else _read(folder / _FILE).get("key", "")
    # By hand, or by Kubeflow: the same place, the same run.
    key = key or hashlib.sha256((place or str(folder)).encode()).hexdigest()
    return f"{recipe.name} {recipe.profile} {key[:12]}"


def _is_complete(recipe: Recipe, run: Path) -> bool:
    """Whether every stage has done what the identities of the last `dvc repro` asked of it."""
    for node in graph_of(recipe.stages, recipe.start_from):
        asked = _read(identity_file(node, run))
        raw_data = asked.pop("raw_data", {})
        if not asked or why_it_runs(node, folders_of(node, run), asked, raw_data):
            return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """A file's keys and values; none where it is missing or damaged, which only costs a second parent."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
