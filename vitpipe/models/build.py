"""Networks from a recipe's `model:` section, of any family.

All raise `RecipeError` when the model's name is unknown or a setting belongs to another family, and
`InputError` when the family cannot use the image size.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vitpipe.config.recipe import ModelConfig
from vitpipe.models.families import family, family_of
from vitpipe.models.network import Classifier, DenseBackbone, Pretrainer, Task
from vitpipe.models.registry import find_model


def build_pretrainer(model: ModelConfig, *, mask_ratio: float = 0.75) -> Pretrainer:
    """The masked pre-training network.

    Args:
        model: the recipe's section.
        mask_ratio: share of the units that are hidden; 0.75 in MAE and in iTPN's released code.
    """
    return family_of(model).pretrainer(model, mask_ratio=mask_ratio)


def build_classifier(
    model: ModelConfig,
    *,
    num_classes: int,
    drop_path: float = 0.0,
    relative_position: bool | None = None,
    head_init_std: float = 2e-5,
) -> Classifier:
    """The classifier.

    Args:
        model: the recipe's section.
        num_classes: number of logits.
        drop_path: drop ratio of the last block.
        relative_position: `None` for what the paper does.
        head_init_std: of the head's weight; 2e-5 is the released value for fine-tuning, in iTPN and MAE.
    """
    return family_of(model).classifier(
        model,
        num_classes=num_classes,
        drop_path=drop_path,
        relative_position=relative_position,
        head_init_std=head_init_std,
    )


def build_dense(
    model: ModelConfig,
    task: Task,
    *,
    image_size: int,
    drop_path: float = 0.0,
    pyramid_depth: int | None = None,
) -> DenseBackbone:
    """The maps that detection and segmentation heads read; see `Family.dense`."""
    return family_of(model).dense(
        model, task, image_size=image_size, drop_path=drop_path, pyramid_depth=pyramid_depth
    )


def create_backbone(name: str, *, image_size: int | None = None, **options: Any) -> nn.Module:
    """A backbone with random weights, for use as a library.

    Args:
        name: a key of `MODELS`.
        image_size: pixels per side; without it the registry entry's.
        options: keyword arguments of the backbone's class.
    """
    entry = find_model(name)
    return family(entry.family).backbone(name, image_size=image_size or entry.image_size, **options)
