"""Dense sets in their own layouts, from folders or from their original archives.

A layout is a module of this package, or of a plugin's datasets/layouts/, that defines `LAYOUT`; the `kind` of
a set in its facts names it. Names and annotations are verified whenever a set is used; images and label maps
are inspected by `prepare` (all) and by `vitpipe doctor` (a sample, or all).
"""

from __future__ import annotations

from pathlib import Path

from vitpipe.contracts.discovery import imported
from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.layouts.file_tree import DenseLayout, Layout, Remark
from vitpipe.datasets.layouts.image_headers import Look

__all__ = ["DenseLayout", "Layout", "Look", "Remark", "inspected", "layout_of", "verified"]


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


def inspected(layout: DenseLayout) -> DenseLayout:
    """The same layout, after every image and label map was inspected.

    Raises:
        DatasetError: naming all kinds of problems, with the fix of the first.
    """
    problems = layout_of(layout.kind).look_into(layout, None).problems
    if problems:
        more = (
            ""
            if len(problems) == 1
            else "; then the others, which `vitpipe doctor` with --data and --deep lists with theirs"
        )
        raise DatasetError(
            "; ".join(problem.what.rstrip(".") for problem in problems),
            where=problems[0].where,
            fix=problems[0].fix + more,
        )
    return layout
