"""What a saved state depends on: recipe values that act on the weights, data, starting weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vitpipe.config.digest import digest_of, file_digest, recipe_sections
from vitpipe.config.own_files import WEIGHTS, own_files, without_keys
from vitpipe.config.recipe import Recipe
from vitpipe.config.set_names import dataset_of
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.graph import Stage
from vitpipe.prepare.set_summary import read_prepared


def weights_identity(stage: Stage, recipe: Recipe, inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """Digests of what decides the weights of a training stage, or the result of another stage."""
    dataset = dataset_read(stage.name, recipe, inputs)
    # An evaluation makes no weights: its result follows from its inputs as a whole.
    if dataset is None or stage.name == "evaluate":
        return {
            "stage": stage.name,
            "recipe": digest_of(recipe_sections(recipe, stage.sections, on_weights_only=True)),
            "inputs": digest_of({name: digest_of(artifact.card) for name, artifact in inputs.items()}),
        }
    weights = starting_weights(stage.name, recipe, inputs)
    acting = recipe_sections(recipe, ("seed", "model", stage.name), on_weights_only=True)
    # By content, below: the same file at another path is the same start, or the same teacher.
    others = own_files(recipe, stage.name)
    acting[stage.name] = without_keys(acting[stage.name], {WEIGHTS, *others})
    others.pop(WEIGHTS, None)
    return {
        "stage": stage.name,
        "recipe": digest_of(acting),
        "data": _data_digest(inputs["data"].path, dataset) if "data" in inputs else "",
        "weights": file_digest(weights) if weights and weights.is_file() else "",
        # Only where there are some, so that states of every other method keep their identity.
        **{key: file_digest(path) if path.is_file() else "" for key, path in others.items()},
    }


def starting_weights(stage: str, recipe: Recipe, inputs: Mapping[str, Artifact]) -> Path | None:
    """The starting weights: the user's file, else the input stage's; None for random ones."""
    own: Path | None = getattr(getattr(recipe, stage, None), "weights", None)
    if own is not None:
        return own
    return inputs["weights"].weights if "weights" in inputs else None


def dataset_read(stage: str, recipe: Recipe, inputs: Mapping[str, Artifact]) -> str | None:
    """The dataset that a stage reads: that of its section, else the one that its weights were trained on."""
    named: str | None = getattr(getattr(recipe, stage, None), "dataset", None)
    if named is not None or "data" not in inputs:
        return named
    trained = inputs["weights"].card if "weights" in inputs else None
    if trained is None or getattr(getattr(recipe, stage, None), "weights", None) is not None:
        return dataset_of(recipe, stage)
    # Cards of earlier versions do not name it.
    return trained.dataset or dataset_of(recipe, trained.stage) or dataset_of(recipe, stage)


def _data_digest(prepared: Path, dataset: str) -> str:
    manifest = read_prepared(prepared).get(dataset)
    return manifest.digest if manifest else ""
