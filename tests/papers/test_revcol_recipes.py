"""The recipe of RevCol against the released configurations and the published sizes."""

from __future__ import annotations

from typing import Any

import pytest

from vitpipe.config.model import find_model
from vitpipe.config.read import load_recipe, variant_names
from vitpipe.config.recipe import Recipe
from vitpipe.papers.published import find_row, rows

SIZES = {"tiny": "RevCol-T", "small": "RevCol-S", "base": "RevCol-B"}
ROWS = [row for row in rows("revcol") if row["metric"].startswith("hparam.")]


def recipe(size: str) -> Recipe:
    return load_recipe(f"revcol/supervised/{size}", "full")


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Our section in the names and units of the released configurations."""
    section = recipe.finetune
    assert section is not None
    optim, augment, method = section.optim, section.augment, section.method
    # All three rates are per 1024 images, as there.
    assert optim.lr_reference_batch == 1024
    assert optim.scale_all_rates
    return {
        "optimizer": {"adamw": "AdamW"}[optim.name],
        "base_lr": optim.base_lr,
        "warmup_lr": optim.warmup_lr,
        "min_lr": optim.min_lr,
        "weight_decay": optim.weight_decay,
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "eps": optim.eps,
        "clip_grad_norm": optim.clip_grad_norm or "none",
        "epochs": section.epochs,
        "warmup_epochs": optim.warmup_epochs,
        "label_smoothing": method.label_smoothing,
        "pixel_weight": method.pixel_weight,
        "class_weight": method.class_weight,
        "rand_augment": augment.rand_augment,
        "erase_probability": augment.erase_probability,
        "mixup": augment.mixup_alpha,
        "cutmix": augment.cutmix_alpha,
        "mix_probability": augment.mix_probability,
        "mix_switch_probability": augment.mix_switch_probability,
        "drop_path": section.drop_path,
        "ema": section.ema_decay,
    }


def test_there_is_a_variant_per_size() -> None:
    assert set(variant_names("revcol/supervised")) == {f"revcol/supervised/{size}" for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_every_released_value_is_the_recipes(size: str) -> None:
    ours = values_of(recipe(size))
    printed = {
        row["metric"].removeprefix("hparam."): row["value"]
        for row in ROWS
        if row["variant"] in (SIZES[size], "all")
    }
    assert set(printed) == set(ours)
    for name, value in printed.items():
        assert ours[name] == (pytest.approx(value) if isinstance(value, (int, float)) else value), name


@pytest.mark.parametrize("size", SIZES)
def test_the_networks_have_the_published_sizes_within_the_claimed_tolerance(size: str) -> None:
    loaded = recipe(size)
    entry = find_model(loaded.model.name)
    measured = {"params": entry.classifier_params, "gmacs": entry.classifier_macs / 1e9}
    claimed = {item.metric: item for item in loaded.expect}
    assert set(claimed) == {"top1", *measured}
    for name, value in measured.items():
        item = claimed[name]
        published = find_row("revcol", item.where)
        assert published["variant"] == SIZES[size]
        assert value * item.scale == pytest.approx(published["value"], abs=item.tolerance)
