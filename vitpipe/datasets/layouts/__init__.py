"""Dense sets in their own layouts, from folders or from their original archives.

A layout is a module of this package, or of a plugin's datasets/layouts/, that defines `LAYOUT`; the `kind` of
a set in its facts names it. Names and annotations are verified whenever a set is used; images are inspected
by `vitpipe doctor` only.
"""

from __future__ import annotations

from pathlib import Path

from vitpipe.contracts.discovery import imported
from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.layouts.file_tree import DenseLayout, Layout
from vitpipe.datasets.layouts.image_headers import Look

__all__ = ["DenseLayout", "Layout", "Look", "layout_of", "verified"]


def layout_of(kind: str) -> Layout:
    """How sets of a kind, such as `coco`, are verified and inspected.

    Raises:
        DatasetError: when there is no such layout.
    """
    try:
        layout: Layout = imported(f"{__package__}.{kind}", f"The layout '{kind}'").LAYOUT
    except (ModuleNotFoundError, AttributeError) as error:
        raise DatasetError(
            f"There is no layout '{kind}' of dense sets ({error})",
            where="kind in datasets/facts/, or data.own_sets",
            fix="use coco, ade20k, davis, or a module of datasets/layouts/ that defines LAYOUT",
        ) from error
    return layout


def verified(kind: str, root: Path, dataset: str) -> DenseLayout:
    """Verify the set in a folder.

    Args:
        kind: of its layout.
        dataset: its name.

    Raises:
        DatasetError: when it does not have this layout, or is incomplete.
    """
    return layout_of(kind).verify(root, dataset)
