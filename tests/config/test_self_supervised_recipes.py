"""Recipes of self-supervised methods: what cannot start is refused when the recipe is read."""

from __future__ import annotations

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import RecipeError

PATCHES = "selfpatch/dino_selfpatch"


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        (PATCHES, ["pretrain.method.crops.local_size=90"], "needs a multiple of 16: give 80 or 96"),
        ("selfpatch/dino", ["model.patch_size=32", "pretrain.method.crops.local_size=16"],
         "multiple of 32: give 32"),
        (PATCHES, ["pretrain.method.crops.local_size=32"], "on 2 x 2 patches of a crop a patch has only 3"),
        (PATCHES, ["pretrain.method.neighbours=9"], "neighbours"),
        (PATCHES, ["model.patch_size=32", "pretrain.method.crops.global_size=64",
                   "pretrain.method.crops.num_local=0"], "on 2 x 2 patches"),
        ("selfpatch/linear/moby", ["pretrain.global_batch=1000"], "queue is 4096, which is no multiple"),
        ("selfpatch/linear/moby", ["pretrain.global_batch=1"], "need a global_batch of 2 or more"),
        ("selfpatch/linear/moby", ["pretrain.method.crops.num_local=2"], "it contrasts two views: give 0"),
        ("selfpatch/dino", ["model.image_size=225"], "is no multiple of patch_size 16"),
        # What would be ignored without a word.
        (PATCHES, ["pretrain.augment.mixup_alpha=0.8"], "pretrain.augment.mixup_alpha is 0.8, which method"),
        ("selfpatch/linear/moby", ["pretrain.augment.crop_scale=[0.5, 1.0]"], "pretrain.augment.crop_scale"),
        ("itpn/pixel_base", ["pretrain.augment.cutmix_alpha=1.0"], "'masked_pixels' does not read"),
        (PATCHES, ["pretrain.ema_decay=0.99"], "pretrain.ema_decay is 0.99"),
        (PATCHES, ["pretrain.method.prototypes=1"], "prototypes"),
        (PATCHES, ["probe.base_lr=[1.0, 1.0e+39]"], "base_lr"),
        (PATCHES, ["pretrain.optim.base_lr=1.0e+39"], "base_lr"),
        (PATCHES, ["pretrain.method.patch_prototypes=1"], "patch_prototypes"),
        ("selfpatch/dino", ["probe.last_blocks=13"], "last_blocks is 13, of 'vit_small'"),
        ("itpn/pixel_base", ["probe.last_blocks=4"], "with these options 1 can be read"),
    ],
)  # fmt: skip
def test_misfits(recipe, overrides, words):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, "full", tuple(overrides))
    assert words in str(error.value)


def test_eight_positives_fit_where_the_grid_has_them():
    recipe = load_recipe(PATCHES, "full", ("pretrain.method.neighbours=8",))
    assert recipe.pretrain.method.grids(recipe.model) == [(14, 14), (6, 6)]
    # Without local crops only the global grid counts.
    large = ("model.patch_size=32", "pretrain.method.crops.num_local=0", "pretrain.method.neighbours=8")
    assert load_recipe(PATCHES, "full", large).pretrain.method.grids(recipe.model) == [(14, 14)]
