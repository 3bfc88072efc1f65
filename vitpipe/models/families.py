"""A family of networks: what a paper brings so that every stage can use its networks.

A paper joins by a folder of its own here with a `family.py` that names its `FAMILY`, and its entries in the
registry.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

import vitpipe.models
from vitpipe.config.recipe import ModelConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.models.network import Classifier, DenseBackbone, Network, Pretrainer, Task
from vitpipe.models.registry import find_model
from vitpipe.models.weights import Rule

WeightsKind = Literal["pretrain", "classifier", "pyramid"]
_PARTS = ("pyramid", "decoder", "columns")


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file is for, read from its keys and shapes.

    Attributes:
        kind: `pretrain` (all of the pre-training network), `classifier`, or `pyramid` (dense features).
        model: name in the registry; empty when the sizes are those of no registered network.
        image_size: pixels per side that the position table is made for; 0 without a table.
        num_classes: of a classifier, else 0.
        pyramid_width, pyramid_depth: 0 without a pyramid.
    """

    family: str
    kind: WeightsKind
    model: str
    image_size: int
    relative_position: bool = False
    num_classes: int = 0
    pyramid_width: int = 0
    pyramid_depth: int = 0

    def __str__(self) -> str:
        size = f" for {self.image_size} pixels" if self.image_size else ""
        return f"a {self.kind} network of {self.model or 'no registered model'}{size}"


class Family(ABC):
    """Builds the networks of one architecture and knows its weights.

    Attributes:
        name: as in the registry.
        parts: sections of `ModelConfig` that mean something to it.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()

    def check(self, model: ModelConfig) -> None:
        """Refuse settings that belong to another family.

        Raises:
            RecipeError: naming them.
        """
        foreign = [part for part in _PARTS if part not in self.parts and getattr(model, part) is not None]
        if foreign:
            raise RecipeError(
                f"{model.name} has no {' and no '.join(foreign)}",
                where=", ".join(f"model.{part}" for part in foreign),
                fix="take it out, or choose another model (`vitpipe models`)",
            )

    @abstractmethod
    def backbone(self, name: str, *, image_size: int) -> nn.Module:
        """The bare backbone with random weights, as a library user wants it."""

    @abstractmethod
    def pretrainer(self, model: ModelConfig, *, mask_ratio: float) -> Pretrainer:
        """The masked pre-training network."""

    @abstractmethod
    def classifier(
        self,
        model: ModelConfig,
        *,
        num_classes: int,
        drop_path: float,
        relative_position: bool | None,
        head_init_std: float,
    ) -> Classifier:
        """The classifier; `relative_position` `None` is as published."""

    @abstractmethod
    def dense(
        self, model: ModelConfig, task: Task, *, image_size: int, drop_path: float, pyramid_depth: int | None
    ) -> DenseBackbone:
        """The maps that the heads of a task read.

        Args:
            image_size: pixels per side that position tables of a fixed size are made for.
            pyramid_depth: of a pyramid, if the family has one and the task has another than `model`.
        """

    @abstractmethod
    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What these weights are; `None` when they are not this family's."""

    @abstractmethod
    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """What may happen to the keys when `network` starts from weights of `info`."""

    @abstractmethod
    def resized(self, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """A position table of a file for the grid of the network's."""


def family(name: str) -> Family:
    """A family by its name in the registry, imported when first used."""
    found: Family = importlib.import_module(f"vitpipe.models.{name}.family").FAMILY
    return found


def families() -> list[Family]:
    """All families: the folders of this room, in alphabetical order."""
    return [family(found.name) for found in pkgutil.iter_modules(vitpipe.models.__path__) if found.ispkg]


def family_of(model: ModelConfig) -> Family:
    """The family of a recipe's network, after a look at its settings.

    Raises:
        RecipeError: when the name is unknown or a setting belongs to another family.
    """
    found = family(find_model(model.name).family)
    found.check(model)
    return found
