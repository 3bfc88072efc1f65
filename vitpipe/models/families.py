"""The interface of a family: how stages build the networks of one paper and transfer their weights.

A family is a folder in `vitpipe/models/` (or in a plugin's `models/`) with a `config.py` (see
`config.model`) and a `family.py` that defines `FAMILY`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from torch import Tensor, nn

from vitpipe.config.model import (
    FAMILIES,
    ModelConfig,
    config_class,
    families_that_build,
    family_names,
    find_model,
)
from vitpipe.contracts.discovery import part_of, source_of
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.contracts.graph import NetworkKind
from vitpipe.models.network import (
    Classifier,
    DenseBackbone,
    Encoder,
    FeaturePredictor,
    IntermediateHeads,
    Network,
    Pretrainer,
    Task,
)
from vitpipe.models.weights import Rule

# `pyramid` means dense features of any family; it is named after the neck of the first one, HiViT's.
WeightsKind = Literal["pretrain", "classifier", "encoder", "pyramid"]
Options = TypeVar("Options", bound=ModelConfig)


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file is for, read from its keys and shapes.

    Attributes:
        family: name of the family whose network it is.
        kind: `pretrain` (all of the pre-training network), `classifier`, `encoder` (neither head nor neck),
            or `pyramid` (dense features).
        model: one of `vitpipe models`; empty when the sizes are those of no registered network.
        image_size: pixels per side that the position table is made for; 0 without a table.
        num_classes: of a classifier, else 0.
        options: what else the family reads from the file, by names of its own; for its `as_stored`.
    """

    family: str
    kind: WeightsKind
    model: str
    image_size: int
    num_classes: int = 0
    options: Mapping[str, bool | int] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f" for {self.image_size} pixels" if self.image_size else ""
        article = "an" if self.kind == "encoder" else "a"
        return f"{article} {self.kind} network of {self.model or 'no registered model'}{size}"


# Of a linear head that is called `head`, between encoders and classifiers.
_NEW_HEAD = Rule("missing", r"^head\.", "a new head")
_OTHER_CLASSES = Rule("fresh", r"^head\.", "another number of classes")
_ONLY_CLASSIFIER = Rule("unused", r"^head\.", "only a classifier has a classification head")


def head_rule(network: Network, info: WeightsInfo) -> Rule:
    """What may differ of a linear head that is called `head`.

    encoder > classifier: a new head. classifier > encoder: the head is not used. Between classifiers the head
    keeps its initial values when the number of classes differs.
    """
    if not isinstance(network, Classifier):
        return _ONLY_CLASSIFIER
    # Between classifiers a missing head would be damage; only another number of classes is allowed.
    return _OTHER_CLASSES if info.kind == "classifier" else _NEW_HEAD


class Family(ABC, Generic[Options]):
    """Builds the networks of one architecture and describes, checks and resizes its weights.

    A family overrides what it has of `encoder`, `classifier`, `intermediate_heads`, `pretrainer`,
    `feature_predictor` and `dense`, and names the same in `builds` of its recipe section; `model` is that
    section.

    Attributes:
        name: that of its folder.
    """

    name: ClassVar[str]

    @abstractmethod
    def backbone(self, name: str, *, image_size: int) -> nn.Module:
        """The bare backbone with random weights, for use as a library."""

    def encoder(self, model: Options, *, drop_path: float) -> Encoder:
        """The network without a head.

        Raises:
            RecipeError: where the family has none; so do the next five.
        """
        raise _lacks(model, "encoder", "is built as no encoder")

    def classifier(self, model: Options, *, num_classes: int, drop_path: float) -> Classifier:
        """The classifier."""
        raise _lacks(model, "classifier", "is built as no classifier")

    def intermediate_heads(self, model: Options, *, num_classes: int) -> IntermediateHeads:
        """Heads at several depths of the classifier, for losses on its intermediate features."""
        raise _lacks(
            model,
            "intermediate_heads",
            "has no heads for intermediate supervision",
            where="method, model.name",
            instead="choose another method",
        )

    def pretrainer(self, model: Options, *, mask_ratio: float) -> Pretrainer:
        """The masked pre-training network."""
        raise _lacks(model, "pretrainer", "has no masked pre-training")

    def feature_predictor(
        self, model: Options, *, target_width: int, drop_path: float, aligned: bool
    ) -> FeaturePredictor:
        """The network that predicts a teacher's features behind masks.

        Args:
            model: the recipe's section.
            target_width: channels of the features.
            drop_path: drop ratio of the last block.
            aligned: hide units from every level of the network, not from its last stage only.
        """
        raise _lacks(model, "feature_predictor", "predicts no teacher's features")

    def dense(self, model: Options, task: Task, *, image_size: int, drop_path: float) -> DenseBackbone:
        """The dense features (feature maps) for the heads of a task.

        Args:
            model: the recipe's section.
            task: `detect` or `segment`.
            image_size: pixels per side that position tables of a fixed size are made for.
            drop_path: drop ratio of the last block.
        """
        raise _lacks(model, "dense", "is built for neither detection nor segmentation")

    def as_stored(self, model: Options, info: WeightsInfo) -> Options:
        """The section of the network that a weights file is for, where the file shows options of its own."""
        return model

    @abstractmethod
    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What these weights are, from names and shapes; `None` when they are not this family's."""

    @abstractmethod
    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """Which keys may be missing, unused or of another shape when `network` loads weights of `info`."""

    def resized(self, network: Network, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """A position table of a file, resized to the grid of the network's; for keys of a `resized` rule.

        Args:
            network: that gets it.
            name: of the parameter.
            given: the file's table.
            wanted: the network's, for its shape.

        Raises:
            ValueError: in a family without such rules.
        """
        raise ValueError(f"{self.name} has no rule that resizes, and {name} is no position table")


def _lacks(
    model: ModelConfig,
    capability: NetworkKind,
    what: str,
    *,
    where: str = "stages, model.name",
    instead: str = "remove the stage",
) -> RecipeError:
    able = families_that_build(capability)
    return RecipeError(
        f"{model.name} {what}",
        where=where,
        fix=f"{instead}, or choose a model of the family {' or '.join(able)} (`vitpipe models` lists them)",
    )


def family(name: str) -> Family[Any]:
    """A family by the name of its folder, imported when first used.

    Raises:
        InputError: as `discovery.part_of`, or when it has another name or builds other networks than its
            section says.
    """
    # By import, without a table of families: a new paper changes no file that is there, and a stage of one
    # family never imports another's networks.
    found: Family[Any] = part_of(FAMILIES, name, "family", "FAMILY", Family)
    if found.name != name:
        raise InputError(
            f"The network family '{found.name}' lies in the folder {name}",
            where=source_of(f"{FAMILIES}.{name}.family") or name,
            fix="give both the same name",
        )
    overridden = tuple(k for k in get_args(NetworkKind) if getattr(type(found), k) is not getattr(Family, k))
    if set(overridden) != set(config_class(name).builds):
        # Recipes are accepted or refused by `builds`, long before this is imported.
        stated = ", ".join(config_class(name).builds) or "nothing"
        raise InputError(
            f"The family '{name}' builds {', '.join(overridden) or 'nothing'}, but states {stated}",
            where=source_of(f"{FAMILIES}.{name}.config") or name,
            fix="name in its section's `builds` what family.py overrides",
        )
    return found


def families() -> list[Family[Any]]:
    """All families, in alphabetical order.

    Raises:
        InputError: as `family`.
    """
    return [family(name) for name in family_names()]


def family_of(model: ModelConfig) -> Family[Any]:
    """The family of a recipe's network.

    Raises:
        RecipeError: when the name is unknown, or the section is of another family's type.
    """
    name = find_model(model.name).family
    if not isinstance(model, config_class(name)):
        raise RecipeError(
            f"{model.name} is a {name} network, whose options this section does not have",
            where="model",
            fix="build the section by `config.model.model_config`, which chooses its type by the name",
        )
    return family(name)
