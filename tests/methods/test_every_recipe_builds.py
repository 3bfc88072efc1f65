"""What every recipe trains can be built at every profile: no value of one part refuses another's."""

from __future__ import annotations

import json

import pytest
import torch

from vitpipe.config.read import load_recipe, profile_names, recipe_names
from vitpipe.methods.method import method_class
from vitpipe.models.build import build_dense
from vitpipe.models.families import family_of

CLASSES = tuple(f"class {number}" for number in range(10))
# Values of a section that say how long and on what is trained, not what.
NOT_BUILT = {"dataset", "epochs", "optim", "augment", "global_batch", "train_share", "validate_epochs"}
BUILT: set[tuple[str, str, str, str]] = set()
TRAINED = ("pretrain", "intermediate", "finetune")


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("name", recipe_names())
def test_networks_and_methods_are_built(name, profile):
    recipe = load_recipe(name, profile, ["data.root=."])
    for stage in set(TRAINED) & set(recipe.stages):
        section = getattr(recipe, stage)
        if _is_new("method", stage, recipe.model, section.model_dump(mode="json", exclude=NOT_BUILT)):
            with torch.device("meta"):
                method = method_class(section.method.name).build(
                    section.method, family_of(recipe.model), recipe.model, section=section, classes=CLASSES
                )
            assert next(method.parameters()).device.type == "meta"
    for task in {"detect", "segment"} & set(recipe.stages):
        size = recipe.segment.crop_size if task == "segment" else recipe.model.image_size
        if _is_new("dense", task, recipe.model, size):
            with torch.device("meta"):
                assert build_dense(recipe.model, task, image_size=size).widths


def _is_new(kind, name, model, values):
    """Whether nothing equal was built in this process: of 552 variants two thirds differ in their data only."""
    key = (kind, name, model.model_dump_json(), json.dumps(values, sort_keys=True))
    is_new = key not in BUILT
    BUILT.add(key)
    return is_new
