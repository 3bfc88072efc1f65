"""The interface of a family: how stages build the networks of one paper and transfer their weights.

A paper is added by a folder here with a `family.py` that defines `FAMILY`, and by entries in the registry.
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

# `pyramid` means dense features of any family; it is named after the neck of the first one, HiViT's.
WeightsKind = Literal["pretrain", "classifier", "pyramid"]
# Sections of `ModelConfig` that only some families have.
_PARTS = ("pyramid", "decoder", "columns")


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file is for, read from its keys and shapes.

    Attributes:
        family: name of the family whose network it is.
        kind: `pretrain` (all of the pre-training network), `classifier`, or `pyramid` (dense features).
        model: name in the registry; empty when the sizes are those of no registered network.
        image_size: pixels per side that the position table is made for; 0 without a table.
        relative_position: whether it has tables of relative positions.
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
    """Builds the networks of one architecture and describes, checks and resizes its weights.

    Attributes:
        name: as in the registry; also the name of its folder.
        parts: optional sections of `ModelConfig` that it uses.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()

    def check(self, model: ModelConfig) -> None:
        """Check that the section has no settings of another family.

        Raises:
            RecipeError: when it has; names them.
        """
        # An error and not ignored: a setting without effect would suggest an experiment that was not made.
        foreign = [part for part in _PARTS if part not in self.parts and getattr(model, part) is not None]
        if foreign:
            raise RecipeError(
                f"{model.name} has no {' and no '.join(foreign)}",
                where=", ".join(f"model.{part}" for part in foreign),
                fix="remove it, or choose another model (`vitpipe models` lists them)",
            )

    @abstractmethod
    def backbone(self, name: str, *, image_size: int) -> nn.Module:
        """The bare backbone with random weights, for use as a library."""

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
        """The classifier; `relative_position` `None` means what the paper does."""

    @abstractmethod
    def dense(
        self, model: ModelConfig, task: Task, *, image_size: int, drop_path: float, pyramid_depth: int | None
    ) -> DenseBackbone:
        """The dense features (feature maps) for the heads of a task.

        Args:
            model: the recipe's section.
            task: `detect` or `segment`.
            image_size: pixels per side that position tables of a fixed size are made for.
            drop_path: drop ratio of the last block.
            pyramid_depth: of a pyramid, where the task has another depth than `model`; `None` for that of
                `model`.
        """

    @abstractmethod
    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What these weights are, from names and shapes; `None` when they are not this family's."""

    @abstractmethod
    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """Which keys may be missing, unused or of another shape when `network` loads weights of `info`."""

    @abstractmethod
    def resized(self, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """A position table of a file, resized to the grid of the network's.

        Args:
            name: of the parameter.
            given: the file's table.
            wanted: the network's, for its shape.
        """


def family(name: str) -> Family:
    """A family by its name in the registry, imported when first used."""
    # By import, without a table of families: a new paper changes no file but the registry, and a stage of one
    # family never imports another's networks.
    found: Family = importlib.import_module(f"vitpipe.models.{name}.family").FAMILY
    return found


def families() -> list[Family]:
    """All families: the sub-packages of `vitpipe.models`, in alphabetical order."""
    return [family(found.name) for found in pkgutil.iter_modules(vitpipe.models.__path__) if found.ispkg]


def family_of(model: ModelConfig) -> Family:
    """The family of a recipe's network; checks the section's settings.

    Raises:
        RecipeError: when the name is unknown or a setting belongs to another family.
    """
    found = family(find_model(model.name).family)
    found.check(model)
    return found
