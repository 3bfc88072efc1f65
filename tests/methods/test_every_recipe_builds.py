"""What every recipe trains can be built at every profile: no value of one part refuses another's."""

from __future__ import annotations

import pytest
import torch

from vitpipe.config.read import load_recipe, profile_names, recipe_names
from vitpipe.methods.method import method_class
from vitpipe.models.build import build_dense
from vitpipe.models.families import family_of

CLASSES = tuple(f"class {number}" for number in range(10))
TRAINED = ("pretrain", "intermediate", "finetune")


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("name", recipe_names())
def test_networks_and_methods_are_built(name, profile):
    recipe = load_recipe(name, profile, ["data.root=."])
    with torch.device("meta"):
        for stage in set(TRAINED) & set(recipe.stages):
            section = getattr(recipe, stage)
            method = method_class(section.method.name).build(
                section.method, family_of(recipe.model), recipe.model, section=section, classes=CLASSES
            )
            assert next(method.parameters()).device.type == "meta"
        for task in {"detect", "segment"} & set(recipe.stages):
            size = recipe.segment.crop_size if task == "segment" else recipe.model.image_size
            assert build_dense(recipe.model, task, image_size=size).widths
