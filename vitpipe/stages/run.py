"""Run one stage, whatever engine asks: open inputs, run it, write the output folder with its card.

The order makes a run safe: folders and inputs are checked before anything is written, one process owns the
folders, outputs appear by one rename at the end, and the training state stays until a later stage has read
that output.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpipe.config.code_identity import code_digest
from vitpipe.config.digest import digest_of, file_fingerprint, git_commit, recipe_sections, stage_identity
from vitpipe.config.libraries import deciding_libraries
from vitpipe.config.own_files import own_files
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import (
    Artifact,
    changed_files,
    folder_in_work,
    open_artifact,
    write_card,
    write_metrics,
    writing,
)
from vitpipe.contracts.discovery import PACKAGE, part_of
from vitpipe.contracts.errors import ArtifactError, DatasetError, RecipeError, StorageError, some
from vitpipe.contracts.git import git_links
from vitpipe.contracts.graph import STAGE_PACKAGE, Node, Stage, all_stages, graph_of
from vitpipe.contracts.logger import RunLogger
from vitpipe.data.loader_processes import loader_errors
from vitpipe.stages.card import make_card, make_run_record, process_started
from vitpipe.stages.chosen_code import chosen_data, chosen_values, stage_closure
from vitpipe.stages.context import StageContext
from vitpipe.stages.folder_lock import locked_folders
from vitpipe.stages.launch import choose_threads
from vitpipe.stages.output_folders import OutputFolders, check_output_folders
from vitpipe.stages.pipeline_run import PipelineRun
from vitpipe.stages.resume import Claim, claim_state, mark_finished, release_states
from vitpipe.stages.run_records import keep_record
from vitpipe.stages.state_folder import state_in
from vitpipe.stages.weights_identity import dataset_read, weights_identity

if TYPE_CHECKING:
    from vitpipe.train.ranks import Ranks


@dataclass(frozen=True)
class _Job:
    """What is known of a stage run before anything is written.

    Attributes:
        identity: digests of what decides the stage, without its inputs.
        libraries: versions of the libraries that its code computes with.
        raw_data: of `prepare`: set -> fingerprint of the user's files, as they are before it reads them.
        parents: input name -> digest of that input's card.
        rank: this process among those that torchrun started; a lone process is 0.
    """

    stage: Stage
    recipe: Recipe
    inputs: dict[str, Artifact]
    folders: OutputFolders
    identity: dict[str, str]
    libraries: dict[str, str]
    raw_data: dict[str, str]
    parents: dict[str, str]
    rank: int


def run_stage(
    name: str,
    recipe: Recipe,
    inputs: Mapping[str, Path],
    out: Path,
    *,
    state: Path | None = None,
    states: Path | None = None,
    pipeline: PipelineRun | None = None,
    needs_all: bool = True,
) -> dict[str, float]:
    """Run a stage of a recipe from input folders to an output folder.

    Args:
        inputs: input name -> folder, as `graph_of(recipe.stages, recipe.start_from)` names them.
        out: the output folder; it appears when the stage is complete.
        state: folder of the resumable training states; beside `out` by default.
        states: instead of `state`, a folder that holds those of many runs (`state_in`).
        pipeline: the run of Kubeflow that the stage is a task of.
        needs_all: false for the report of a failed run, some of whose stages have no output.

    Returns:
        The stage's flat metrics.

    Raises:
        RecipeError: the recipe has no such stage.
        ArtifactError: an input is missing or not what it should be, a folder may not be written, or another
            process writes it.
        StorageError, RunError: as `loader_errors`, beside what the stage itself raises.
    """
    from vitpipe.stages.chain_run import chain_key

    started = process_started()
    choose_threads(recipe)  # before torch is imported
    job = _open_job(name, recipe, inputs, out, state, states, needs_all=needs_all)
    with (
        loader_errors(),
        # Left in reverse: ranks part, folder renamed, logger FINISHED, state reduced, lock released. A kill
        # in between loses nothing, and what is FINISHED has its output.
        _claimed(job, out) as claim,
        _logger(job, chain_key(recipe, out, pipeline), pipeline) as logger,
        _output_folder(job) as folder,
        _joined(job.stage) as ranks,
    ):
        _keep_records(job, states, pipeline, job.inputs.values())
        for line in _remarks(job, claim):
            logger.say(line)
        own = job.folders
        ctx = StageContext(name, recipe, job.inputs, folder, own.state, logger, ranks, own.previous)
        metrics: dict[str, float] = part_of(STAGE_PACKAGE, name, "stage", "run")(ctx)
        if job.rank == 0:
            write_metrics(folder, metrics)
            _offer_model(ctx, metrics)
            getattr(logger, "succeed", lambda: None)()  # writes the last tables; the card names every file
            card = make_card(job.stage, ctx, job.identity, job.parents, job.libraries)
            known = {"notes": (*claim.notes, *getattr(logger, "notes", ())), "raw_data": job.raw_data}
            known |= {"tracking_run": getattr(logger, "run_id", "")}
            write_card(folder, card, make_run_record(job.stage, ctx, started).model_copy(update=known))
    _keep_records(job, states, pipeline, map(open_artifact, [job.folders.out]))
    return metrics


def _keep_records(
    job: _Job, states: Path | None, pipeline: PipelineRun | None, artifacts: Iterable[Artifact]
) -> None:
    """Leave on the volume of the states what the task at the end of a pipeline reports from."""
    if job.rank != 0 or states is None or pipeline is None or not pipeline.run_id:
        return
    try:
        for artifact in artifacts:
            keep_record(states, pipeline, artifact)
    except (OSError, StorageError) as error:
        # Only the report of a failed run reads them: no full or foreign volume takes finished work with it.
        print(f"The report of a failed run would lack this stage: {error}", file=sys.stderr)


def _offer_model(ctx: StageContext, metrics: dict[str, float]) -> None:
    # Other stages have no use for what this imports: the report, Pillow.
    if getattr(getattr(ctx.recipe, ctx.stage, None), "register_model", False):
        from vitpipe.stages.offered_model import offer_model

        offer_model(ctx, metrics)


def _open_job(
    name: str,
    recipe: Recipe,
    inputs: Mapping[str, Path],
    out: Path,
    state: Path | None,
    states: Path | None,
    *,
    needs_all: bool,
) -> _Job:
    """Check names, folders and inputs; nothing is written."""
    node = node_of(recipe, name)
    if not needs_all:
        node = replace(node, inputs={key: feeder for key, feeder in node.inputs.items() if key in inputs})
    _check_input_names(node, inputs)
    # Before the inputs are opened, which takes time; and again with the folder that they decide.
    folders = check_output_folders(name, recipe, inputs, out, state)
    artifacts = {key: open_artifact(inputs[key], node.inputs[key]) for key in node.inputs}
    if state is None and states is not None:
        own = state_in(states, node.stage, recipe, artifacts)
        folders = check_output_folders(name, recipe, inputs, out, own)
    return _Job(
        node.stage,
        recipe,
        artifacts,
        folders,
        identity_of(recipe, node.stage),
        deciding_libraries(stage_closure(recipe, node.stage).words),
        raw_data_of(recipe, node.stage),
        {key: digest_of(artifact.card) for key, artifact in artifacts.items()},
        int(os.environ.get("RANK", "0")),  # torchrun's
    )


def _remarks(job: _Job, claim: Claim) -> Iterator[str]:
    """What is to be said of the folders before the work begins."""
    yield from claim.messages
    # `writing` moves an edited output aside instead of replacing it.
    if job.rank == 0 and (changed := changed_files(job.folders.out)):
        yield (
            f"{job.folders.out} has changed since it was written ({some(changed)}); it will be moved aside, "
            "not replaced, and `vitpipe clean` lists it"
        )
    yield from (artifact.remark for artifact in job.inputs.values() if artifact.remark)


@contextmanager
def _claimed(job: _Job, out: Path) -> Iterator[Claim]:
    """Own the stage's folders (rank 0), and resume the saved state or move it aside.

    Args:
        out: the output folder as it was given, which may be a link to another disk.
    """
    if job.rank != 0:
        yield Claim()
        return
    from vitpipe.stages.chain_run import end_chain  # it takes identities from this module

    with locked_folders(job.folders.out, job.folders.state):
        # This stage has opened and verified its inputs: the states that made them are not needed any more.
        release_states(job.inputs, job.folders.state)
        recorded = {
            "code_digest": job.identity["code_digest"],
            "libraries": job.libraries,
        }
        decides = weights_identity(job.stage, job.recipe, job.inputs)
        yield claim_state(job.folders.state, decides, recorded, job.folders.out)
        mark_finished(job.folders.state, open_artifact(job.folders.out).card)
    end_chain(job.recipe, job.stage.name, out)


@contextmanager
def _output_folder(job: _Job) -> Iterator[Path]:
    """The folder to write into: the real one on rank 0, a temporary one elsewhere."""
    # Stages write without asking for their rank; what the other ranks write is thrown away.
    if job.rank == 0:
        with writing(job.folders.out) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="vitpipe-rank-") as folder_name:
            yield Path(folder_name)


@contextmanager
def _logger(job: _Job, chain: str, pipeline: PipelineRun | None) -> Iterator[RunLogger]:
    from vitpipe.track.stage_run import SilentLogger, stage_run

    if job.rank != 0:
        yield SilentLogger()
        return
    with stage_run(
        stage=job.stage.name,
        recipe=job.recipe,
        folder=folder_in_work(job.folders.out),
        state=job.folders.state,
        tags={
            "git_commit": git_commit(),
            **git_links(PACKAGE),
            **(pipeline.tags() if pipeline is not None else {}),
        },
        provenance=_provenance(job),
        params=recipe_sections(job.recipe, job.stage.sections),
        pipeline=chain,
        class_names=_class_names(job),
    ) as logger:
        yield logger


def _class_names(job: _Job) -> dict[str, str]:
    """Class key -> name for people, of the dataset that the stage reads."""
    dataset = dataset_read(job.stage.name, job.recipe, job.inputs)
    if dataset is None or "data" not in job.inputs:
        return {}
    from vitpipe.prepare.set_summary import read_set, readable_classes

    # Its absence is the stage's to report.
    with suppress(DatasetError):
        return readable_classes(read_set(job.inputs["data"].path, dataset))
    return {}


def _provenance(job: _Job) -> dict[str, Any]:
    """Digests of code, recipe, data and inputs, which the tracker keeps as one file beside the numbers."""
    # Any input: all of them go back to the same prepared data.
    data = next((artifact.card.data_digest for artifact in job.inputs.values()), "")
    return {**job.identity, "data_digest": data, "parents": job.parents, "libraries": job.libraries}


@contextmanager
def _joined(stage: Stage) -> Iterator[Ranks | None]:
    """The processes that share a training stage; None for the others, which run without torch."""
    if stage.resources.gpus == 0:
        yield None
        return
    import torch

    from vitpipe.train.ranks import joined

    # torchrun's variables; a process that it has not started is alone.
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, num_ranks, local_rank = (int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True))
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    with joined(rank, num_ranks, device) as ranks:
        yield ranks


def node_of(recipe: Recipe, name: str) -> Node:
    """The node of a stage in the recipe's graph.

    Raises:
        RecipeError: when there is no such stage, or this recipe does not have it.
    """
    for node in graph_of(recipe.stages, recipe.start_from):
        if node.name == name:
            return node
    # A typing error and a stage that this recipe does not have need different lists of choices.
    known = name in all_stages()
    what = f"The recipe {recipe.name} at profile {recipe.profile} has no stage '{name}'"
    raise RecipeError(
        what if known else f"There is no stage '{name}'",
        where="STAGE",
        fix=f"choose one of: {', '.join(recipe.stages if known else all_stages())}",
    )


def identity_of(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """The digests that decide a stage, without its input folders."""
    closure = stage_closure(recipe, stage)
    return stage_identity(
        recipe,
        stage=stage.name,
        sections=stage.sections,
        image=stage.image,
        code=code_digest(closure, chosen_data(recipe, stage)),
        libraries=deciding_libraries(closure.words),
        values=chosen_values(recipe, stage),
    )


def raw_data_of(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """Set, or recipe key of a file -> fingerprint of the user's files, for a stage that reads them."""
    # Not in `identity_of`, which is on the card: a file that was only touched makes prepare run again, gives
    # the same bytes, and must then re-run nothing behind it.
    named = own_files(recipe, stage.name)
    files = {f"{stage.name}.{key}": file_fingerprint(path) for key, path in named.items()}
    if "data" not in stage.sections or recipe.data.source != "folders":
        return files
    from vitpipe.datasets.raw_fingerprint import raw_fingerprints

    return {**files, **raw_fingerprints(recipe.data)}


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
