"""Kubeflow's side of a stage: read the executor input, write the executor output. Does not import kfp.

Kubeflow replaces `{{$}}` in a container's command by one JSON text, the ExecutorInput: parameter values, the
paths of the input artifacts, the paths for the outputs. A container whose output artifacts shall exist
afterwards, with metadata and metrics, writes `executor_output.json` (ExecutorOutput). The local Docker
runner and a cluster's launcher read the same file, so one entry point serves both.

Outputs of every stage: `out`, the stage's folder, and `metrics`, its flat numbers. Any other output is one
file of the folder or of its tables, found by its stem: `report` is `report.html`. For `confusion`, Kubeflow's
ClassificationMetrics, the matrix stands in the metadata, too, from which its pages draw it.
"""

from __future__ import annotations

import html
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitpipe.config.carried import recipe_from
from vitpipe.config.digest import file_digest
from vitpipe.config.pipeline_parameters import FIXED_OVERRIDES, OVERRIDES, check_section, stage_of_parameter
from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import CARD, METRICS, TABLES, Artifact, open_artifact
from vitpipe.contracts.errors import ArtifactError, InputError, disk_errors
from vitpipe.contracts.files import write_whole
from vitpipe.stages.pipeline_run import CODE_DIGESTS, PipelineRun
from vitpipe.stages.run import identity_of, node_of

OUT, METRICS_OUTPUT, CONFUSION_OUTPUT, RECEIPT = "out", "metrics", "confusion", "receipt"
# Kubeflow stores the matrix in a row of its database and draws a square per pair of classes.
_MAX_DRAWN_CLASSES = 50
# Where a launcher mounts object stores, by the scheme of an artifact's address.
_MOUNTS = {"gs://": "/gcs/", "s3://": "/s3/", "minio://": "/minio/"}
_WORKSPACE = "/kfp-workspace/.artifacts/"
# Shown in Kubeflow's interface beside the artifact; the whole card lies in the folder.
_CARD_KEYS = (
    "stage",
    "recipe",
    "profile",
    "recipe_digest",
    "code_digest",
    "data_digest",
    "identity",
    "image",
    "seed",
)
_RUN_KEYS = ("git_commit", "started_at", "wall_seconds", "tracking_run")


class ExecutorIO:
    """One stage's inputs and outputs as Kubeflow passes them.

    Args:
        text: the ExecutorInput as JSON.

    Raises:
        InputError: when the text is not an ExecutorInput that has an output `out`.
    """

    def __init__(self, text: str) -> None:
        try:
            message = json.loads(text)
            self._parameters: dict[str, Any] = message.get("inputs", {}).get("parameterValues", {})
            if not isinstance(self._parameters, dict):
                raise TypeError("'parameterValues' is not a mapping")
            self._inputs = _artifacts(message.get("inputs", {}))
            self._outputs = _artifacts(message["outputs"])
            self._output_file = Path(message["outputs"]["outputFile"])
            self._folder = local_path(self._outputs[OUT])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(
                f"The executor input cannot be read ({type(error).__name__}: {error})",
                where="--executor-input",
                fix="let Kubeflow fill it in: the component's command must hold '{{$}}'",
            ) from error

    def parameters(self) -> dict[str, Any]:
        """All parameter values of the task, as JSON values."""
        return dict(self._parameters)

    def overrides(self) -> tuple[str, ...]:
        """The recipe's overrides: those that the package has fixed, of the stages, and of the whole run.

        Raises:
            InputError: when they are not lists of texts, or one is of another section than its parameter.
        """
        by_stage = [name for name in self._parameters if stage_of_parameter(name)]
        for name in by_stage:
            check_section(name, self.texts(name))
        names = [FIXED_OVERRIDES, *sorted(by_stage), OVERRIDES]
        return tuple(text for name in names for text in self.texts(name))

    def texts(self, name: str) -> list[str]:
        """A parameter that is a list of texts; empty when it is not given.

        Raises:
            InputError: it is something else.
        """
        value = self._parameters.get(name) or []
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise InputError(
                f"The pipeline parameter '{name}' is not a list of texts",
                where="--executor-input",
                fix='give a JSON list, for example ["seed=1"]',
            )
        return value

    def recipe(self, name: str, profile: str, more: Sequence[str] = ()) -> Recipe:
        """The recipe of the task: the values that the package carries, with the run's overrides.

        Args:
            name: with a package that carries no values, a recipe that is here.
            more: overrides after those of the run.

        Raises:
            InputError: the carried values are damaged.
            RecipeError: a value is wrong, or an override changes what a package has fixed.
        """
        overrides = [*self.overrides(), *more]
        if carried := self._parameters.get("recipe_values"):
            return recipe_from(name, profile, str(carried), overrides)
        return load_recipe(name, profile, overrides)

    def code_digests(self) -> dict[str, str]:
        """Stage -> digest of its code, which a package's check compares with the image.

        Raises:
            InputError: the text is no mapping of texts.
        """
        text = str(self._parameters.get(CODE_DIGESTS) or "{}")
        try:
            return {str(stage): str(digest) for stage, digest in json.loads(text).items()}
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"The pipeline parameter '{CODE_DIGESTS}' is no JSON mapping ({error})",
                where="--executor-input",
                fix="compile the package again",
            ) from error

    def inputs(self) -> dict[str, Path]:
        """Input name -> folder, for the input artifacts that were given."""
        return {name: local_path(artifact) for name, artifact in self._inputs.items()}

    def moved_to(self, inputs: Mapping[str, Path], folder: Path) -> str:
        """The same task's ExecutorInput with other places, for a process that does not see these.

        Parameters and addresses stay: the run that the task belongs to, and what its recipe carries.

        Args:
            inputs: input name -> folder with the same artifact.
            folder: for the stage's folder, `out`, and the ExecutorOutput; other outputs are left out.
        """
        moved = {name: _moved(self._inputs[name], place) for name, place in inputs.items()}
        message = {
            "inputs": {"parameterValues": self._parameters, "artifacts": moved},
            "outputs": {
                "artifacts": {OUT: _moved(self._outputs[OUT], folder / OUT)},
                "outputFile": str(folder / self._output_file.name),
            },
        }
        return json.dumps(message, sort_keys=True)

    def output_folder(self) -> Path:
        """The stage's output folder; its parent is made, a receipt of an earlier try is removed."""
        if _is_main():
            with disk_errors(self._folder):
                # The local runner mounts the pipeline root without the folders in it.
                self._folder.parent.mkdir(parents=True, exist_ok=True)
                # A retried pod keeps its file system: an old receipt would pass for this attempt's.
                self._output_file.unlink(missing_ok=True)
        return self._folder

    def pipeline_run(self, stage: str) -> PipelineRun:
        """The run that the task belongs to, by the address of its output.

        Args:
            stage: the beginning of the task's name; an output is at `ROOT/PIPELINE/RUN/TASK/...`.
        """
        parts = str(self._outputs[OUT].get("uri", "")).split("/")
        ends = [i for i, part in enumerate(parts) if part == stage or part.startswith(f"{stage}-")]
        return PipelineRun("/".join(parts[: ends[-1]]) if ends else "")

    def check_code(self, recipe: Recipe, stage: str) -> None:
        """Refuse to work when this code is not the code that the pipeline was compiled from.

        Kubeflow's cache uses the digest that the pipeline was compiled with; an image with other code behind
        the same tag would fill it with wrong results.

        Args:
            recipe: it chooses some of the code.

        Raises:
            ArtifactError: when the digests differ.
            RecipeError: when the recipe has no such stage.
        """
        refuse_other_code(recipe, stage, str(self._parameters.get("code_digest") or ""))

    def finish(self, metrics: Mapping[str, float], metadata: Mapping[str, Any] | None = None) -> None:
        """Write the file outputs, then `executor_output.json` by one rename.

        The receipt in the metadata of `out` is the SHA-256 of its card. The local Docker runner reports some
        failed containers as succeeded, so `vitpipe local` demands it. Ranks other than 0 write nothing.

        Args:
            metrics: the stage's flat numbers; those that are not finite stay in metrics.json only, because
                Kubeflow's metadata cannot hold them.
            metadata: more entries for the metadata of `out`.

        Raises:
            ArtifactError: when the stage's folder is not complete.
            StorageError: when the disk is full.
        """
        if not _is_main():
            return
        artifact = open_artifact(self._folder)
        filled: dict[str, dict[str, Any]] = {
            OUT: {
                **_card_metadata(artifact),
                **(metadata or {}),
                RECEIPT: file_digest(self._folder / CARD),
            },
            METRICS_OUTPUT: {name: float(v) for name, v in metrics.items() if math.isfinite(v)},
            CONFUSION_OUTPUT: confusion_matrix(artifact.tables()),
        }
        with disk_errors(self._output_file):
            # `out` is there already: the stage has written its folder to that very path.
            for name in self._outputs.keys() - {OUT}:
                self._copy_file_output(name)
            _write_json(self._output_file, {"artifacts": self._described(filled)})

    def finish_with_text(self, text: str) -> None:
        """End a task that has no folder to show; each of its pages is this one sentence.

        Raises:
            StorageError: when the disk is full.
        """
        page = f"<!doctype html><html><body><p>{html.escape(text)}</p></body></html>"
        with disk_errors(self._output_file):
            for name, artifact in self._outputs.items():
                if name in (OUT, METRICS_OUTPUT):
                    continue  # Kubeflow allows a task to leave an output out
                target = local_path(artifact)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(f"{page if 'HTML' in str(artifact.get('type')) else text}\n", "utf-8")
            _write_json(self._output_file, {})

    def finish_with_files(self, files: Mapping[str, Path], metrics: Mapping[str, float]) -> None:
        """End a task that is no stage; its folder has no card.

        Args:
            files: output -> the file that is its page.
            metrics: flat numbers.

        Raises:
            StorageError: when the disk is full.
        """
        with disk_errors(self._output_file):
            for name, source in files.items():
                if name in self._outputs:
                    target = local_path(self._outputs[name])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
            _write_json(self._output_file, {"artifacts": self._described({METRICS_OUTPUT: dict(metrics)})})

    def _copy_file_output(self, name: str) -> None:
        """Every declared output gets its bytes: Kubeflow never caches a task with an unwritten output."""
        pattern = METRICS if name == METRICS_OUTPUT else f"{name}.*"
        places = (self._folder, self._folder / TABLES)
        source = next((file for place in places for file in sorted(place.glob(pattern))), None)
        if source is None:
            raise ArtifactError(
                f"The stage's folder holds no file for its output '{name}'",
                where=self._folder,
                fix=f"the stage must write a file {name}.* into its folder",
            )
        target = local_path(self._outputs[name])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def _described(self, filled: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            name: {
                "artifacts": [
                    {
                        "name": artifact.get("name", name),
                        "uri": artifact["uri"],
                        "metadata": dict(filled.get(name, {})),
                    }
                ]
            }
            for name, artifact in self._outputs.items()
        }


def refuse_other_code(recipe: Recipe, stage: str, promised: str) -> None:
    """Raise ArtifactError where a stage's code has another digest than the promised one, if there is one."""
    found = identity_of(recipe, node_of(recipe, stage).stage)["code_digest"]
    if promised and promised != found:
        raise ArtifactError(
            f"The image holds other code than the pipeline was compiled from "
            f"({found[:12]} instead of {promised[:12]})",
            where=f"stage {stage}",
            fix="build the images from the same commit, and compile the pipeline again with this run's "
            "overrides",
        )


def local_path(artifact: Mapping[str, Any]) -> Path:
    """The path of a RuntimeArtifact's bytes inside the container.

    Object store addresses are mounted by the launcher, image addresses (`oci://`) lie below /oci with their
    slashes replaced, artifacts of the run's workspace below its mount; any other address is a path.

    Args:
        artifact: RuntimeArtifact as JSON: `uri`, and perhaps `customPath` and `metadata`.
    """
    if artifact.get("customPath"):
        return Path(artifact["customPath"])
    uri: str = artifact["uri"]
    path = uri
    for scheme, mount in _MOUNTS.items():
        if uri.startswith(scheme):
            path = mount + uri.removeprefix(scheme)
    if uri.startswith("oci://"):
        path = "/oci/" + uri.removeprefix("oci://").replace("/", "_")
    if (artifact.get("metadata") or {}).get("_kfp_workspace") is True:
        path = _WORKSPACE + path.lstrip("/")
    return Path(path)


def confusion_matrix(tables: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, Any]:
    """Metadata of Kubeflow's ClassificationMetrics; empty where there is no matrix, or one too large to draw.

    Args:
        tables: of a stage's folder: `per_class` names the classes, `confusion` has the pairs that occur.
    """
    classes = [row["class"] for row in tables.get("per_class", ())]
    if "confusion" not in tables or not 0 < len(classes) <= _MAX_DRAWN_CLASSES:
        return {}
    counts = {(row["true"], row["predicted"]): float(row["images"]) for row in tables["confusion"]}
    rows = [{"row": [counts.get((true, predicted), 0.0) for predicted in classes]} for true in classes]
    names = [{"displayName": name} for name in classes]
    return {"confusionMatrix": {"annotationSpecs": names, "rows": rows}}


def _artifacts(side: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> RuntimeArtifact of one side of the message; an empty list counts as not given."""
    lists = {name: value.get("artifacts", []) for name, value in side.get("artifacts", {}).items()}
    return {name: items[0] for name, items in lists.items() if items}


def _moved(artifact: Mapping[str, Any], place: Path) -> dict[str, Any]:
    kept = {key: artifact[key] for key in ("name", "uri") if key in artifact}
    return {"artifacts": [{**kept, "customPath": str(place)}]}


def _card_metadata(artifact: Artifact) -> dict[str, Any]:
    return {
        **{key: getattr(artifact.card, key) for key in _CARD_KEYS},
        **{key: getattr(artifact.run, key) for key in _RUN_KEYS},
        "notes": "; ".join(artifact.run.notes),
    }


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
