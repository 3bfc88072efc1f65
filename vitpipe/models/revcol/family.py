"""The RevCol family, first version: its classifier from a recipe, and which weights it takes from another.

Reversible Column Networks; Yuxuan Cai et al.; arXiv 2212.11696: supervised training on ImageNet-1K, or on
ImageNet-22K and then ImageNet-1K.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from vitpipe.config.recipe import ColumnsConfig, ModelConfig
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.models.families import Family, WeightsInfo
from vitpipe.models.network import Network, Task
from vitpipe.models.revcol.revcol import NUM_LEVELS, SHAPES, STRIDE, RevCol, RevColShape
from vitpipe.models.weights import Rule

# Its length is the number of classes.
HEAD_BIAS = "cls.classifier.1.bias"
_OTHER_CLASSES = Rule("fresh", r"^cls\.classifier\.1\.", "another number of classes")


class RevColFamily(Family):
    """Builds RevCol's classifier, and reads and transfers its weights."""

    name = "revcol"
    parts = ("columns",)

    def check(self, model: ModelConfig) -> None:
        """As the base class; also refuses numbers of columns, which the model's name fixes here.

        Raises:
            RecipeError: when one is given.
        """
        super().check(model)
        # `columns` itself is allowed: its memory mode applies to RevCol too.
        columns = model.columns or ColumnsConfig()
        given = [kind for kind in ("bottom_up", "top_down") if getattr(columns, kind) is not None]
        if given:
            raise RecipeError(
                f"{model.name} always has {SHAPES[model.name].num_columns} columns, all of one kind",
                where=", ".join(f"model.columns.{kind}" for kind in given),
                fix="remove it, or choose a revcol model with another number of columns or a revcolv2 model",
            )

    def backbone(self, name: str, *, image_size: int, **options: Any) -> RevCol:
        """The whole network, whose `run_columns` gives feature maps; `options` are those of `RevCol`.

        Raises:
            InputError: when `image_size` is no multiple of 32.
        """
        # Convolutional: the network itself has no image size, the check only reports a wrong one early.
        _check_image_size(name, image_size)
        return RevCol(SHAPES[name], **options)

    def pretrainer(self, model: ModelConfig, *, mask_ratio: float) -> NoReturn:
        """Not available: RevCol has no masked pre-training.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            f"{model.name} has no masked pre-training: RevCol's first version was trained with labels only",
            where="stages: pretrain",
            fix="remove the stage, or choose a revcolv2 model (`vitpipe models` lists them)",
        )

    def classifier(
        self,
        model: ModelConfig,
        *,
        num_classes: int,
        drop_path: float,
        relative_position: bool | None,
        head_init_std: float,
    ) -> RevCol:
        """The network with one classifier at the end, without intermediate supervision.

        Raises:
            RecipeError: when relative positions are asked for.
            InputError: when `image_size` is no multiple of 32.
        """
        if relative_position:
            raise RecipeError(
                f"{model.name} has no relative positions",
                where="relative_position",
                fix="remove relative_position from the section",
            )
        _check_image_size(model.name, model.image_size)
        columns = model.columns or ColumnsConfig()
        return RevCol(
            SHAPES[model.name],
            num_classes,
            drop_path=drop_path,
            head_init_std=head_init_std,
            memory_mode=columns.memory_mode,
            allow_reversible_amp=columns.reversible_autocast,
        )

    def dense(
        self, model: ModelConfig, task: Task, *, image_size: int, drop_path: float, pyramid_depth: int | None
    ) -> NoReturn:
        """Not available for RevCol here.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            f"{model.name} can only classify; it is not built for detection and segmentation",
            where=f"stages: {task}",
            fix="remove the stage, or choose a hivit or revcolv2 model (`vitpipe models` lists them)",
        )

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by the names of stem and first column."""
        if "stem.0.weight" not in state or "subnet0.alpha0" not in state:
            return None
        shape, head = shape_of(state), state.get(HEAD_BIAS)
        return WeightsInfo(
            family=self.name,
            kind="classifier",
            model="" if shape is None else shape.name,
            image_size=0,  # no position table: any multiple of 32
            num_classes=0 if head is None else head.numel(),
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """classifier > classifier: a last layer for another number of classes keeps its initial values."""
        # The head's LayerNorm before it fits any number of classes and is loaded.
        return (_OTHER_CLASSES,)

    def resized(self, name: str, given: Tensor, wanted: Tensor) -> NoReturn:
        """Not available: no rule of this family resizes.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"RevCol has no position tables, and {name} is none")


def shape_of(state: Mapping[str, Tensor]) -> RevColShape | None:
    """The size in `SHAPES` that has these columns, widths and blocks; `None` when there is none."""
    columns = {found[1] for name in state if (found := re.match(r"subnet(\d+)\.", name))}
    alphas = [state.get(f"subnet0.alpha{level}") for level in range(NUM_LEVELS)]
    blocks = [
        {found[1] for name in state if (found := re.match(rf"subnet0\.level{level}\.blocks\.(\d+)\.", name))}
        for level in range(NUM_LEVELS)
    ]
    widths = tuple(0 if alpha is None else alpha.numel() for alpha in alphas)
    # The first column has no `up` links, so the second shows whether level 0 reads level 3 (revcol_huge
    # alone).
    to_lowest = "subnet1.level0.fusion.up2.channel_reschedule.0.weight" in state
    sizes = (widths, tuple(map(len, blocks)), len(columns), to_lowest)
    known = ((s, (s.widths, s.depths, s.num_columns, s.top_to_lowest)) for s in SHAPES.values())
    return next((shape for shape, its_sizes in known if its_sizes == sizes), None)


def _check_image_size(name: str, image_size: int) -> None:
    if image_size % STRIDE:
        raise InputError(
            f"{name} downsamples images by {STRIDE}, which does not divide {image_size} pixels",
            where="model.image_size",
            fix=f"use a multiple of {STRIDE}",
        )


FAMILY = RevColFamily()
