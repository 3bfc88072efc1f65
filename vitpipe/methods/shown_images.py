"""Which validation images a method's figure shows: the first of each class, or the first ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

NUM_SHOWN = 6


class ShownImages:
    """Chooses the first image of each class, up to `NUM_SHOWN`.

    Args:
        by_class: otherwise the first images, whatever their labels.

    Attributes:
        rows: what is shown of each image, one picture per column.
    """

    def __init__(self, *, by_class: bool) -> None:
        self.by_class = by_class
        self.rows: list[list[Tensor]] = []
        self.classes: set[int] = set()

    def wanted(self, labels: Sequence[int]) -> list[int]:
        """Positions in a batch of images that are shown; the caller adds a row for each."""
        if not self.by_class:
            return list(range(min(len(labels), NUM_SHOWN - len(self.rows))))
        found = []
        for position, label in enumerate(labels):
            if label not in self.classes and len(self.classes) < NUM_SHOWN:
                self.classes.add(label)
                found.append(position)
        return found
