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

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import disk_errors
from vitpipe.contracts.files import read_keys, write_whole
from vitpipe.contracts.graph import graph_of
from vitpipe.stages.identity import folders_of, identity_file, why_it_runs
from vitpipe.stages.pipeline_run import PipelineRun

KEY_VARIABLE = "VITPIPE_PIPELINE"
_FILE = ".chain.json"


def begin_chain(recipe: Recipe, run: Path) -> None:
    """Write a new key if the last run of the chain is complete, or was of another seed.

    To be called before the identities of this run replace those of the last one, by which it is judged.

    Args:
        run: the run's folder, see `vitpipe.config.read.run_folder`.
    """
    known = read_keys(run / _FILE)
    is_open = isinstance(known.get("key"), str) and known["key"] and not known.get("complete")
    if is_open and known.get("seed") == recipe.seed and not _is_complete(recipe, run):
        return
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    _write(run, uuid.uuid4().hex, recipe, complete=False)


def end_chain(recipe: Recipe, stage: str, out: Path) -> None:
    """Note that the run is complete, after a stage that feeds no other one.

    The outputs themselves say it only until `dvc checkout` or `dvc exp apply` puts others in their place.

    Args:
        out: the stage's output folder, as it was given.
    """
    run = out.parent.resolve()
    known = read_keys(run / _FILE)
    nodes = graph_of(recipe.stages, recipe.start_from)
    feeds = any(stage in node.inputs.values() for node in nodes)
    if isinstance(known.get("key"), str) and not feeds and _is_complete(recipe, run):
        _write(run, known["key"], recipe, complete=True)


def _write(run: Path, key: str, recipe: Recipe, *, complete: bool) -> None:
    values = {"key": key, "seed": recipe.seed, "complete": complete}
    write_whole(run / _FILE, json.dumps(values) + "\n")


def chain_key(recipe: Recipe, out: Path, pipeline: PipelineRun | None = None) -> str:
    """The key that MLflow finds the chain's run by.

    Args:
        out: the stage's output folder, as it was given.
        pipeline: the run of Kubeflow; None for a stage that it did not start.
    """
    if given := os.environ.get(KEY_VARIABLE):
        return given
    # Not `out` itself, which may be a link to another disk: its stages belong together.
    folder = out.parent.resolve()
    address = pipeline.folder if pipeline is not None else ""
    key = "" if address else str(read_keys(folder / _FILE).get("key", ""))
    # Stages of one pipeline run, or run by hand into one folder, get the same key from that place.
    key = key or hashlib.sha256(os.fsencode(address or folder)).hexdigest()
    return f"{recipe.name} {recipe.profile} {key[:12]}"


def _is_complete(recipe: Recipe, run: Path) -> bool:
    """Whether every stage has done what the identities of the last `dvc repro` asked of it."""
    for node in graph_of(recipe.stages, recipe.start_from):
        # A damaged file costs a second parent run, nothing else.
        asked = read_keys(identity_file(node, run))
        raw_data = asked.pop("raw_data", {})
        if not asked or why_it_runs(node, folders_of(node, run), asked, raw_data):
            return False
    return True
