"""A share of a training set, stratified by class: what low-shot figures are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.contracts.seeds import seed_of


class LabelledSet(Protocol):
    """What a share is taken of: an `ImageSet` that tells all class numbers without reading an image."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class folder names in the order of the class numbers."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names for people; empty when unknown."""

    @property
    def labels(self) -> NDArray[np.uint32]:
        """Class numbers of all images, (num_images,)."""

    def __len__(self) -> int: ...

    def decode_many(self, positions: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """See `ShardSet.decode_many`."""


class LowShot:
    """Some images of a set, of every class its part; which ones is a function of the seed.

    Of a set without classes, whose labels are all 0, they are any images.

    Args:
        shards: the whole set.
        num_images: to choose, see `LoopConfig.num_images`.
        seed: of the run.

    Attributes:
        positions: of the chosen images in the whole set, ascending, (num_images,).
    """

    def __init__(self, shards: LabelledSet, num_images: int, seed: int) -> None:
        self.shards, self.classes, self.class_names = shards, shards.classes, shards.class_names
        labels = shards.labels
        order = np.random.default_rng(seed_of("low shot", seed)).permutation(len(labels))
        # Place of every image among those of its class, as a fraction: the smallest ones of all classes
        # together are a stratified choice of exactly the size that `plan` counts with.
        place = np.empty(len(labels))
        for number in np.unique(labels):
            own = order[labels[order] == number]
            place[own] = (np.arange(len(own)) + 0.5) / len(own)
        chosen = np.argsort(place[order], kind="stable")[:num_images]
        self.positions: NDArray[np.int64] = np.sort(order[chosen])

    def __len__(self) -> int:
        return len(self.positions)

    def decode_many(self, positions: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """As `ShardSet.decode_many`, by positions among the chosen images."""
        return self.shards.decode_many([int(self.positions[position]) for position in positions])
