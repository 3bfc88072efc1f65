"""What a saved state depends on: recipe values that act on the weights, data, starting weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitpipe.config.digest import digest_of, file_digest
from vitpipe.config.recipe import Recipe
from vitpipe.config.resolve import TRAINED_ON
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.graph import Stage
from vitpipe.prepare.set_summary import read_prepared

# Recipe values that a training stage reads but that do not act on its weights: when to log and save, how to
# measure, and the path of the starting weights, whose content counts instead.
_NOT_IN_WEIGHTS = {
    "checkpoint_minutes",
    "eval_batch",
    "eval_crop_ratio",
    "inference",
    "log_every_steps",
    "multi_scale_ratios",
    "stride",
    "test_size",
    "weights",
    "workers",
}


def weights_identity(stage: Stage, recipe: Recipe, inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """Digests of what decides the weights of a training stage, or the result of another stage."""
    plain = recipe.model_dump(mode="json")
    dataset = TRAINED_ON.get(stage.name)
    if dataset is None:
        return {
            "stage": stage.name,
            "recipe": digest_of({name: _acting(plain[name]) for name in stage.sections}),
            "inputs": digest_of({name: digest_of(artifact.card) for name, artifact in inputs.items()}),
        }
    # By content: the same weights at another path are the same start.
    weights = starting_weights(stage.name, recipe, inputs)
    return {
        "stage": stage.name,
        "recipe": digest_of({name: _acting(plain[name]) for name in ("seed", "model", stage.name)}),
        "data": _data_digest(inputs["data"].path, dataset) if "data" in inputs else "",
        "weights": file_digest(weights) if weights and weights.is_file() else "",
    }


def starting_weights(stage: str, recipe: Recipe, inputs: Mapping[str, Artifact]) -> Path | None:
    """The starting weights: the user's file, else the input stage's; None for random ones."""
    own: Path | None = getattr(getattr(recipe, stage, None), "weights", None)
    if own is not None:
        return own
    return inputs["weights"].weights if "weights" in inputs else None


def _data_digest(prepared: Path, dataset: str) -> str:
    manifest = read_prepared(prepared).get(dataset)
    return manifest.digest if manifest else ""


def _acting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _acting(inner) for key, inner in value.items() if key not in _NOT_IN_WEIGHTS}
    return value
