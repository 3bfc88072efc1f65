"""Run one stage, whatever engine asks: open inputs, hand over, write the output folder with its card.

The order of things is what makes a run safe: places and inputs are checked before anything is made, one
process owns the folders, outputs appear by one rename at the end, and the training state stays until a later
stage has read that output.
"""

from __future__ import annotations

import datetime
import importlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.digest import (
    digest_of,
    git_commit,
    hardware,
    library_versions,
    recipe_sections,
    stage_identity,
)
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import Artifact, Card, open_artifact, write_card, write_metrics, writing
from vitpipe.contracts.errors import ArtifactError, RecipeError
from vitpipe.contracts.graph import BY_NAME, Node, Stage, graph_of
from vitpipe.contracts.logger import RunLogger
from vitpipe.stages.context import StageContext
from vitpipe.stages.folder_lock import locked_folders
from vitpipe.stages.launch import choose_threads
from vitpipe.stages.output_folders import OutputFolders, check_output_folders
from vitpipe.stages.resume import Claim, claim_state, mark_finished, release_states
from vitpipe.stages.weights_identity import weights_identity


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun started; a lone process is rank 0 of 1."""

    rank: int
    num_ranks: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> Rank:
        """Read torchrun's variables."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, num_ranks, local_rank = (int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True))
        return cls(rank, num_ranks, local_rank)


def run_stage(
    name: str,
    recipe: Recipe,
    inputs: Mapping[str, Path],
    out: Path,
    *,
    state: Path | None = None,
) -> dict[str, float]:
    """Run a stage of a recipe from input folders to an output folder.

    Args:
        inputs: input name -> folder, as `graph_of(recipe.stages, recipe.start_from)` names them.
        out: the output folder; it appears when the stage is complete.
        state: where resumable training states live; beside `out` by default.

    Returns:
        The stage's flat metrics.

    Raises:
        RecipeError: the recipe has no such stage.
        ArtifactError: an input is missing or not what it should be, a folder may not be written, or another
            process writes it.
    """
    started = _process_started()
    node = node_of(recipe, name)
    choose_threads(recipe)
    rank = Rank.from_environment()
    _check_input_names(node, inputs)
    places = check_output_folders(name, recipe, inputs, out, state)
    artifacts = {key: open_artifact(inputs[key], node.inputs[key]) for key in node.inputs}
    identity = identity_of(recipe, node.stage)
    parents = {key: digest_of(artifact.card) for key, artifact in artifacts.items()}
    with _claimed(node.stage, recipe, artifacts, identity, places, rank) as claim:
        with (
            _output_folder(places.out, rank) as folder,
            _logger(
                node.stage, recipe, folder, places.state, _tags(identity, parents, artifacts), rank
            ) as logger,
        ):
            for line in claim.said:
                logger.say(line)
            module = importlib.import_module(f"vitpipe.stages.{name}")
            context = StageContext(
                name, recipe, artifacts, folder, places.state, logger,
                rank.rank, rank.num_ranks, rank.local_rank, _device(node.stage, rank),
                places.out if places.out.is_dir() else None,
            )  # fmt: skip
            metrics: dict[str, float] = module.run(context)
            if rank.rank == 0:
                write_metrics(folder, metrics)
                getattr(logger, "succeed", lambda: None)()  # its tables are files that the card names
                card = _card(node.stage, recipe, identity, parents, artifacts, folder, started)
                run_id = getattr(logger, "run_id", "")
                write_card(folder, card.model_copy(update={"tracking_run": run_id, "notes": claim.notes}))
        if rank.rank == 0:
            mark_finished(places.state, open_artifact(places.out).card)
    return metrics


@contextmanager
def _claimed(
    stage: Stage,
    recipe: Recipe,
    artifacts: Mapping[str, Artifact],
    identity: Mapping[str, str],
    places: OutputFolders,
    rank: Rank,
) -> Iterator[Claim]:
    """Own the stage's folders (rank 0), and take up or put aside the state that is there."""
    if rank.rank != 0:
        yield Claim()
        return
    with locked_folders(places.out, places.state):
        release_states(artifacts, places.state)
        recorded = {
            "code_digest": identity["code_digest"],
            "libraries": library_versions(dense=stage.image == "dense"),
        }
        yield claim_state(places.state, weights_identity(stage, recipe, artifacts), recorded, places.out)


def node_of(recipe: Recipe, name: str) -> Node:
    """The node of a stage in the recipe's graph.

    Raises:
        RecipeError: when there is no such stage, or this recipe does not have it.
    """
    for node in graph_of(recipe.stages, recipe.start_from):
        if node.name == name:
            return node
    known = name in BY_NAME
    what = f"The recipe {recipe.name} at profile {recipe.profile} has no stage '{name}'"
    raise RecipeError(
        what if known else f"There is no stage '{name}'",
        where="STAGE",
        fix=f"choose one of: {', '.join(recipe.stages if known else BY_NAME)}",
    )


def identity_of(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """The digests that decide a stage, without its input folders."""
    return stage_identity(
        recipe, stage=stage.name, sections=stage.sections, code=stage.code, image=stage.image
    )


def _check_input_names(node: Node, given: Mapping[str, Path]) -> None:
    missing = [name for name in node.inputs if name not in given]
    extra = [name for name in given if name not in node.inputs]
    if missing or extra:
        parts = [f"needs the input '{name}' (the output of {node.inputs[name]})" for name in missing]
        parts += [f"has no input '{name}'" for name in extra]
        raise ArtifactError(
            f"Stage '{node.name}' {' and '.join(parts)}",
            where="--in NAME=DIR",
            fix="give " + (" ".join(f"--in {n}=DIR" for n in node.inputs) or "no --in at all"),
        )


@contextmanager
def _output_folder(out: Path, rank: Rank) -> Iterator[Path]:
    """The folder to write into: the real one on rank 0, a throw-away one elsewhere."""
    if rank.rank == 0:
        with writing(out) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="vitpipe-rank-") as folder_name:
            yield Path(folder_name)


@contextmanager
def _logger(
    stage: Stage, recipe: Recipe, folder: Path, state: Path, tags: Mapping[str, str], rank: Rank
) -> Iterator[RunLogger]:
    from vitpipe.track.stage_run import SilentLogger, stage_run

    if rank.rank != 0:
        yield SilentLogger()
        return
    with stage_run(
        stage=stage.name,
        recipe=recipe,
        folder=folder,
        state=state,
        tags=tags,
        params=recipe_sections(recipe, stage.sections),
    ) as logger:
        yield logger


def _tags(
    identity: Mapping[str, str], parents: Mapping[str, str], artifacts: Mapping[str, Artifact]
) -> dict[str, str]:
    """What the tracker keeps beside the numbers: where code, data and inputs come from."""
    tags = {**identity, "git_commit": git_commit(), **{f"parent.{k}": v for k, v in parents.items()}}
    if artifacts:
        tags["data_digest"] = next(iter(artifacts.values())).card.data_digest
    return tags


def _process_started() -> float:
    """When this process started (seconds since the epoch), so that imports count as wall time."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, AttributeError):  # not Linux: the imports are then not counted
        return time.time()


def _revisions_of(prepare_folder: Path) -> dict[str, dict[str, str]]:
    from vitpipe.stages.used_datasets import revisions_of

    return revisions_of(prepare_folder)


def _device(stage: Stage, rank: Rank) -> str:
    if stage.resources.gpus == 0:
        return "cpu"
    import torch

    return f"cuda:{rank.local_rank}" if torch.cuda.is_available() else "cpu"


def _card(
    stage: Stage,
    recipe: Recipe,
    identity: Mapping[str, str],
    parents: Mapping[str, str],
    artifacts: Mapping[str, Artifact],
    folder: Path,
    started: float,
) -> Card:
    if stage.name == "prepare":
        from vitpipe.data.manifest import DataManifest, read_digest, read_manifest

        data_digest, revisions = read_digest(folder), read_manifest(folder, DataManifest).revisions
    else:
        data = artifacts.get("data") or artifacts.get("prepare")
        data_digest = data.card.data_digest if data else ""
        revisions = _revisions_of(data.path) if data else {}
    return Card(
        stage=stage.name,
        recipe=recipe.name,
        profile=recipe.profile,
        recipe_digest=identity["recipe_digest"],
        code_digest=identity["code_digest"],
        data_digest=data_digest,
        data_revisions=revisions,
        image=stage.image,
        identity=identity["identity"],
        parents=dict(parents),
        seed=recipe.seed,
        git_commit=git_commit(),
        libraries=library_versions(dense=stage.image == "dense"),
        hardware=hardware(),
        started_at=datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        wall_seconds=round(time.time() - started, 3),
    )
