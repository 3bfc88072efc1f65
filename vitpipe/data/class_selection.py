"""Some classes of a packed set, as positions in its index and new class numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ClassSelection:
    """The images of some classes, in the order in which they would be packed as a set of their own.

    Four bytes of memory per image, and per class of the whole set.

    Args:
        labels: class numbers in the whole set, (num_images,).
        whole: class keys of the whole set in the order of their numbers.
        chosen: class keys in the order of their new numbers.

    Attributes:
        positions: in the whole set, (num_chosen,).
    """

    def __init__(self, labels: NDArray[np.uint32], whole: Sequence[str], chosen: Sequence[str]) -> None:
        number_of = {key: number for number, key in enumerate(chosen)}
        # Classes that are left out get a number that no class has.
        self._number = np.array([number_of.get(key, len(chosen)) for key in whole], np.uint32)
        positions = np.flatnonzero(self._number[labels] < len(chosen))
        # In the canonical order a set is packed class by class, by class number; other sources (parquet) keep
        # the order of their files.
        if (labels[1:] >= labels[:-1]).all():
            positions = positions[np.argsort(self._number[labels[positions]], kind="stable")]
        self.positions: NDArray[np.uint32] = positions.astype(np.uint32)

    def __len__(self) -> int:
        return len(self.positions)

    def label(self, whole_label: int) -> int:
        """The new number of a chosen class."""
        return int(self._number.item(whole_label))

    def labels(self, whole_labels: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """New class numbers of all chosen images, (num_chosen,).

        Args:
            whole_labels: class numbers in the whole set, (num_images,).
        """
        found: NDArray[np.uint32] = self._number[whole_labels[self.positions]]
        return found
