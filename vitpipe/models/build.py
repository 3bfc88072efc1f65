"""Networks from a recipe's `model:` section, of any family.

All raise `RecipeError` when the model's name is unknown or its family does not build what is asked for, and
`InputError` when the family cannot use the image size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitpipe.config.model import ModelConfig, find_model
from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.families import WeightsInfo, family, family_of
from vitpipe.models.network import Classifier, DenseBackbone, Encoder, Pretrainer, Task
from vitpipe.models.transfer import describe
from vitpipe.models.weights import load_state


def build_pretrainer(model: ModelConfig, *, mask_ratio: float = 0.75) -> Pretrainer:
    """The masked pre-training network.

    Args:
        model: the recipe's section.
        mask_ratio: share of the units that are hidden; 0.75 in MAE and in iTPN's released code.
    """
    return family_of(model).pretrainer(model, mask_ratio=mask_ratio)


def build_classifier(model: ModelConfig, *, num_classes: int, drop_path: float = 0.0) -> Classifier:
    """The classifier.

    Args:
        model: the recipe's section.
        num_classes: number of logits.
        drop_path: drop ratio of the last block.
    """
    return family_of(model).classifier(model, num_classes=num_classes, drop_path=drop_path)


def build_encoder(model: ModelConfig, *, drop_path: float = 0.0) -> Encoder:
    """The network without a head, for methods and probes."""
    return family_of(model).encoder(model, drop_path=drop_path)


def build_dense(model: ModelConfig, task: Task, *, image_size: int, drop_path: float = 0.0) -> DenseBackbone:
    """The maps that detection and segmentation heads read; see `Family.dense`."""
    return family_of(model).dense(model, task, image_size=image_size, drop_path=drop_path)


def as_stored(model: ModelConfig, info: WeightsInfo) -> ModelConfig:
    """The section with the options that a weights file shows; see `Family.as_stored`."""
    return family_of(model).as_stored(model, info)


def stored_classifier(model: ModelConfig, path: Path) -> tuple[Callable[[], Classifier], dict[str, Tensor]]:
    """How to build the classifier that a weights file holds, and its weights.

    Classes and options come from the file, not from the recipe: it may be another stage's.

    Args:
        model: the recipe's section.
        path: safetensors file.

    Raises:
        CheckpointError: the file cannot be read, or holds no classifier.
    """
    state = load_state(path)
    info = describe(state, path)
    if info.kind != "classifier":
        raise CheckpointError(
            f"The weights are those of {info}, which cannot classify",
            where=path,
            fix="give the weights of a finetune stage; a recipe without one has no stage evaluate either",
        )
    return partial(build_classifier, as_stored(model, info), num_classes=info.num_classes), state


def create_backbone(name: str, *, image_size: int | None = None, **options: Any) -> nn.Module:
    """A backbone with random weights, for use as a library.

    Args:
        name: one of `vitpipe models`.
        image_size: pixels per side; without it the entry's.
        options: keyword arguments of the backbone's class.
    """
    entry = find_model(name)
    return family(entry.family).backbone(name, image_size=image_size or entry.image_size, **options)
