"""The RevCol family, first version: its classifier from a recipe, and what carries over to the next one.

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

HEAD_BIAS = "cls.classifier.1.bias"
_OTHER_CLASSES = Rule("fresh", r"^cls\.classifier\.1\.", "another number of classes")


class RevColFamily(Family):
    """See the module."""

    name = "revcol"
    parts = ("columns",)

    def check(self, model: ModelConfig) -> None:
        """Also refuse numbers of columns, which belong to the name here.

        Raises:
            RecipeError: naming them.
        """
        super().check(model)
        columns = model.columns or ColumnsConfig()
        given = [kind for kind in ("bottom_up", "top_down") if getattr(columns, kind) is not None]
        if given:
            raise RecipeError(
                f"The columns of {model.name} are of one kind, {SHAPES[model.name].num_columns} of them",
                where=", ".join(f"model.columns.{kind}" for kind in given),
                fix="take it out (the model's name says how many there are), or choose a revcolv2 model",
            )

    def backbone(self, name: str, *, image_size: int, **options: Any) -> RevCol:
        """The whole network; its `run_columns` gives maps. `options` are those of `RevCol`.

        Raises:
            InputError: when `image_size` is no multiple of 32.
        """
        _check_image_size(name, image_size)
        return RevCol(SHAPES[name], **options)

    def pretrainer(self, model: ModelConfig, *, mask_ratio: float) -> NoReturn:
        """There is none.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            f"{model.name} has no masked pre-training: RevCol's first version was trained with labels only",
            where="stages: pretrain",
            fix="take the stage out, or choose a revcolv2 model (`vitpipe models`)",
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
        """One classifier at the end, without intermediate supervision.

        Raises:
            RecipeError: when relative positions are asked for.
            InputError: when `image_size` is no multiple of 32.
        """
        if relative_position:
            raise RecipeError(
                f"{model.name} has no relative positions",
                where="relative_position",
                fix="take relative_position out of the section",
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
        """There is none.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            f"{model.name} classifies only: there are no maps for the heads of detection and segmentation",
            where=f"stages: {task}",
            fix="take the stage out, or choose a hivit or revcolv2 model (`vitpipe models`)",
        )

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """By the names of stem and first column; the network takes any image size."""
        if "stem.0.weight" not in state or "subnet0.alpha0" not in state:
            return None
        shape, head = shape_of(state), state.get(HEAD_BIAS)
        return WeightsInfo(
            family=self.name,
            kind="classifier",
            model="" if shape is None else shape.name,
            image_size=0,
            num_classes=0 if head is None else head.numel(),
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """classifier > classifier: the head's last layer starts afresh when the number of classes differs."""
        return (_OTHER_CLASSES,)

    def resized(self, name: str, given: Tensor, wanted: Tensor) -> NoReturn:
        """No rule of this family resizes.

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
    to_lowest = "subnet1.level0.fusion.up2.channel_reschedule.0.weight" in state
    sizes = (widths, tuple(map(len, blocks)), len(columns), to_lowest)
    known = ((s, (s.widths, s.depths, s.num_columns, s.top_to_lowest)) for s in SHAPES.values())
    return next((shape for shape, its_sizes in known if its_sizes == sizes), None)


def _check_image_size(name: str, image_size: int) -> None:
    if image_size % STRIDE:
        raise InputError(
            f"{name} halves images five times, and {image_size} pixels do not allow it",
            where="model.image_size",
            fix=f"use a multiple of {STRIDE}",
        )


FAMILY = RevColFamily()
