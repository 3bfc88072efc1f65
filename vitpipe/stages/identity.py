"""One small identity file per stage, and a forecast of which stages would run and why.

DVC depends on these files instead of on the recipe and the source tree: a file whose content did
not change re-runs nothing. Kubeflow's cache gets the same digests as component inputs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitpipe.config.digest import digest_of
from vitpipe.config.own_files import own_files
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import CARD, RunRecord, open_artifact
from vitpipe.contracts.errors import ArtifactError, InputError, RecipeError, some
from vitpipe.contracts.files import write_whole
from vitpipe.contracts.graph import Node, Stage, all_stages, graph_of
from vitpipe.contracts.safe_yaml import SAFE_LOADER
from vitpipe.stages.output_folders import check_output_folders, check_result_folder
from vitpipe.stages.run import identity_of, raw_data_of

IDENTITY = "identity"


@dataclass(frozen=True)
class StageFolders:
    """Where one stage of a run reads and writes: input name -> folder, and the output folder."""

    inputs: dict[str, Path]
    out: Path


def folders_of(node: Node, run: Path) -> StageFolders:
    """A stage's folders below a run's folder, as `dvc.yaml` names them.

    Args:
        run: `artifacts/RECIPE/PROFILE`, see `vitpipe.config.read.run_folder`.
    """
    return StageFolders({name: run / feeder for name, feeder in node.inputs.items()}, run / node.name)


def identity_file(node: Node, run: Path) -> Path:
    """The file that says what decides a stage, below a run's folder."""
    return run / IDENTITY / f"{node.name}.json"


def dvc_dependencies(nodes: Sequence[Node]) -> dict[str, list[str]]:
    """Stage -> the inputs that are its dependencies in `dvc.yaml`: without those behind another input.

    Of a stage that takes every other one, the report, only those remain that feed no other stage. A card
    names the cards before it, so whatever changes in front of them changes them, too. `dvc dag` is 195
    columns wide with these edges and up to 260 with all.
    """
    feeders = {name for node in nodes if not node.stage.takes_every_stage for name in node.inputs.values()}
    return {
        node.name: [
            key for key, name in node.inputs.items() if not (node.stage.takes_every_stage and name in feeders)
        ]
        for node in nodes
    }


@dataclass(frozen=True)
class Forecast:
    """Whether a stage would run: `why` is a sentence, `missing` what it would stop at."""

    stage: str
    runs: bool
    why: str
    missing: str = ""


def write_identities(recipe: Recipe, out: Path) -> None:
    """Write `OUT/<stage>.json` for every stage of the recipe and remove those of other stages.

    A file of another program that has the name of a stage is neither replaced nor removed.

    Raises:
        ArtifactError: when there is one.
        RecipeError: when the raw data are in no folder.
    """
    recipe.data.require_root(f"recipe {recipe.name}, profile {recipe.profile}")
    out = check_result_folder("--out", out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for node in graph_of(recipe.stages, recipe.start_from):
        decides: dict[str, Any] = {**identity_of(recipe, node.stage)}
        if raw_data := raw_data_of(recipe, node.stage):
            decides["raw_data"] = raw_data
        wanted[out / f"{node.name}.json"] = json.dumps(decides, indent=2) + "\n"
    ours = {out / f"{name}.json" for name in all_stages() if (out / f"{name}.json").exists()}
    for path in sorted(ours):
        if not _is_identity(path):
            raise ArtifactError(
                "The file is not one of a stage's identity; nothing was touched",
                where=path,
                fix="remove it if vitpipe wrote it, else give `vitpipe identity` another --out",
            )
    # Of stages that the recipe had before: DVC would go on tracking them.
    for stale in ours - set(wanted):
        stale.unlink()
    # The same text gives the same checksum, so DVC re-runs nothing.
    for path, text in wanted.items():
        write_whole(path, text)


def _is_identity(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path.is_file() and path.stat().st_size == 0  # written on a full disk
    return isinstance(values, dict) and {"stage", "identity"} <= set(values)


def check_stage_folders(recipe: Recipe, run: Path) -> None:
    """Check every folder that a stage of the run would write, before DVC empties it.

    DVC removes the output of a stage that has changed before it starts the stage, whose own check then finds
    nothing of the user's any more. `vitpipe identity` is what `dvc repro` runs first.

    Raises:
        ArtifactError: as `check_output_folders`, for the first folder that holds something else.
    """
    for node in graph_of(recipe.stages, recipe.start_from):
        _check_stage_folder(recipe, node, run)


def _check_stage_folder(recipe: Recipe, node: Node, run: Path) -> None:
    folders = folders_of(node, run)
    if folders.out.is_symlink() and not folders.out.exists():
        # DVC empties the folder that a link leads to, but replaces a link that leads nowhere.
        raise ArtifactError(
            f"The output folder is a link to {folders.out.readlink()}, which does not exist; nothing was "
            "touched",
            where=folders.out.absolute(),
            fix="make that folder or mount its disk, or remove the link",
        )
    check_output_folders(node.name, recipe, folders.inputs, folders.out, None)


def check_dvc_folder(folder: Path) -> None:
    """Refuse a project folder in which DVC cannot work.

    DVC 3.67 writes the folder's path into the format of its progress bars, where braces mean something, and
    into files in UTF-8; it ends in a traceback.

    Raises:
        InputError: the path holds a brace or bytes that are no UTF-8.
    """
    path = str(folder.resolve())
    found = next((brace for brace in "{}" if brace in path), "")
    wrong = f"holds '{found}'" if found else ""
    try:
        path.encode()
    except UnicodeEncodeError:
        wrong = "is not text in UTF-8"
    if wrong:
        raise InputError(
            f"DVC cannot work in this folder: its path {wrong}",
            where=path,
            fix="rename that folder, or move the project (a link to it is not enough); `vitpipe run STAGE` "
            "works without DVC",
        )


def check_dvc_file(recipe: Recipe, path: Path) -> None:
    """Check that `dvc.yaml` has the graph of this recipe; a missing file is fine.

    Raises:
        InputError: as `check_dvc_folder`.
        RecipeError: when it was written for a recipe with another graph, or hands values of params.yaml to
            a shell, as earlier versions wrote it.
    """
    if not path.is_file():
        return
    check_dvc_folder(path.absolute().parent)
    written = yaml.load(path.read_text(encoding="utf-8"), Loader=SAFE_LOADER)["stages"]
    unsafe = [name for name, stage in written.items() if "${" in str(stage.get("cmd", ""))]
    if unsafe:
        raise RecipeError(
            f"Commands in dvc.yaml hold values of params.yaml, which a shell would run ({', '.join(unsafe)})",
            where=path,
            fix="run `vitpipe compile --dvc`, then `dvc repro` again",
        )
    # Only names of stages are compared: dvc.yaml holds ${recipe}, so its folders fit any recipe.
    edges = {(name, Path(dep).name) for name, stage in written.items() for dep in stage.get("deps", ())}
    nodes = graph_of(recipe.stages, recipe.start_from)
    watched = dvc_dependencies(nodes)
    wanted = {
        (node.name, upstream)
        for node in nodes
        for upstream in (*(node.inputs[key] for key in watched[node.name]), f"{node.name}.json")
    }
    if edges != wanted:
        differ = ", ".join(sorted({name for name, _ in edges ^ wanted}))
        raise RecipeError(
            f"dvc.yaml was written for a recipe with another graph (it differs at {differ})",
            where=f"recipe {recipe.name}, profile {recipe.profile}",
            fix="run `vitpipe compile --dvc`, then `dvc repro` again",
        )


def forecast(recipe: Recipe, run: Path) -> list[Forecast]:
    """Which stages of a recipe would run, given the finished ones in the run's folder."""
    forecasts: list[Forecast] = []
    reruns: set[str] = set()
    for node in graph_of(recipe.stages, recipe.start_from):
        identity, raw_data = identity_of(recipe, node.stage), raw_data_of(recipe, node.stage)
        why = why_it_runs(node, folders_of(node, run), identity, raw_data, reruns)
        if why:
            reruns.add(node.name)
        # What is finished needs no raw data any more.
        missing = (_missing_files(recipe, node.stage) or _in_the_way(recipe, node, run)) if why else ""
        forecasts.append(Forecast(node.name, bool(why), why or "nothing that it reads has changed", missing))
    return forecasts


def _in_the_way(recipe: Recipe, node: Node, run: Path) -> str:
    """What of the user's the stage would refuse to replace; empty if there is nothing."""
    try:
        _check_stage_folder(recipe, node, run)
    except ArtifactError as error:
        return f"{error.what} ({folders_of(node, run).out})"
    return ""


def _missing_files(recipe: Recipe, stage: Stage) -> str:
    """The recipe's path that the stage would look for in vain; empty if there is none."""
    for key, path in own_files(recipe, stage.name).items():
        if not path.exists():
            return f"{stage.name}.{key} does not exist: {path}"
    return recipe.data.root_problem(looks=True) if "data" in stage.sections else ""


def why_it_runs(
    node: Node,
    folders: StageFolders,
    identity: Mapping[str, str],
    raw_data: Mapping[str, str],
    reruns: Collection[str] = (),
) -> str:
    """Why a stage would run, as a sentence; empty when `folders.out` holds its finished output.

    Args:
        identity: as `identity_of` has it now.
        raw_data: as `raw_data_of` has it now.
        reruns: stages before it that will run.
    """
    if not (folders.out / CARD).is_file():
        return "it has not run yet"
    try:
        artifact = open_artifact(folders.out, node.name)
    except ArtifactError as error:
        return error.what
    card = artifact.card
    upstream = [stage for stage in node.inputs.values() if stage in reruns]
    # The output of a stage that runs again is not known yet, so this one is assumed to run, too; DVC skips it
    # if the new output has the same bytes.
    if upstream:
        return f"{', '.join(upstream)} runs before it"
    if card.recipe_digest != identity["recipe_digest"]:
        return "the part of the recipe that it reads has changed"
    if card.code_digest != identity["code_digest"]:
        return "the code that decides it has changed"
    if card.identity != identity["identity"]:
        return "its image or a library version has changed"
    if changed := _changed_raw_data(artifact.run, raw_data):
        return f"the files of {some(changed)} have changed"
    moved = [
        stage
        for key, stage in node.inputs.items()
        if card.parents.get(key) != digest_of(open_artifact(folders.inputs[key], stage).card)
    ]
    return f"its input from {', '.join(moved)} is another one" if moved else ""


def _changed_raw_data(record: RunRecord, raw_data: Mapping[str, str]) -> list[str]:
    """Sets and keys whose files are not those that were read; none where that is not known."""
    # A folder that DVC has fetched has no record. Its files are those of dvc.lock, so nothing has to run.
    known = record.raw_data
    return [name for name, found in raw_data.items() if known and known.get(name) != found]
