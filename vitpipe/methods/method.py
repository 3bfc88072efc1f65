"""The interface of all methods: the networks that learn, their losses, and hooks around the update.

A method is a folder `methods/<name>/`: `config.py` has its options, `method.py` a subclass of `Method` as
`METHOD`. The stage builds it, the loop calls it:

    build > begin > for each step: [losses of each micro-batch > backward] > clip > before_update
          > optimiser > after_step ... > results, judge

The loop owns everything else: accumulation, precision, ranks, optimiser, average of weights, saved states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from torch import Tensor

from vitpipe.config.method import METHODS, MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.resolve import Precision
from vitpipe.config.train_sections import AugmentConfig, TrainConfig
from vitpipe.contracts.discovery import part_of
from vitpipe.data.augment import Transform, train_transform
from vitpipe.data.batches import Batch
from vitpipe.models.families import Family
from vitpipe.train.ranks import Ranks
from vitpipe.train.trainable import Trainable

# This rank's share of a split, centre crops in the set's order; asked again it begins again.
CentreCrops = Callable[[Literal["train", "val"]], Iterator[Batch]]


class ImageColumns(NamedTuple):
    """A figure: one row per image, one column per title.

    Attributes:
        columns: title -> images (B, 3, H, W), normalised as the training images.
        note: what the figure shows and how its images were chosen.
    """

    columns: Mapping[str, Tensor]
    note: str = ""


class Judgement(NamedTuple):
    """What a trained method is worth.

    Attributes:
        metrics: by name, the same on every rank.
        tables: rows by name.
        figures: by name; rank 0's are drawn.
        warnings: sentences that the report puts above the numbers.
    """

    metrics: dict[str, float]
    tables: Mapping[str, list[dict[str, Any]]] = {}
    figures: Mapping[str, ImageColumns] = {}
    warnings: Sequence[str] = ()


class Method(Trainable):
    """Base of all methods: what the loop trains, with the building of it before and a measurement after."""

    @classmethod
    @abstractmethod
    def build(
        cls,
        config: MethodConfig,
        family: Family[Any],
        model: ModelConfig,
        *,
        section: TrainConfig,
        classes: Sequence[str],
    ) -> Self:
        """The method with random weights.

        Args:
            config: the method's options, an instance of its `CONFIG`.
            family: builds the networks of the recipe's model.
            model: the recipe's model.
            section: the stage's, for what is not the method's own, such as mixing in `augment`.
            classes: names of the classes of the training set; none for one without labels, whose images all
                have label 0. A method that has to have classes says so by `needs_classes` of its options.
        """

    def views(self, augment: AugmentConfig, image_size: int) -> Transform:
        """What happens to a training image; a list of tensors gives several `Batch.views`."""
        return train_transform(augment, image_size)

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one micro-batch, see `Trainable.losses`."""

    @abstractmethod
    def judge(self, batches: CentreCrops, ranks: Ranks, precision: Precision) -> Judgement:
        """Measure what has been learnt, in evaluation mode; every rank calls it.

        Args:
            batches: `train` or `val` -> this rank's share, on the CPU; over all ranks every image once.
            precision: of the forward pass.
        """


def method_class(name: str) -> type[Method]:
    """A method by the name of its folder, imported when first used.

    Raises:
        InputError: as `discovery.part_of`.
    """
    found: type[Method] = part_of(METHODS, name, "method", "METHOD", Method)
    return found
