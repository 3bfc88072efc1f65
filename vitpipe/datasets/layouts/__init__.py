"""Dense sets in their own layouts, from folders or from their original archives.

Names and annotations are verified whenever a set is used; images are inspected by `vitpipe doctor` only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vitpipe.datasets.layouts.ade20k import look_into_ade20k, verify_ade20k
from vitpipe.datasets.layouts.coco import look_into_coco, verify_coco
from vitpipe.datasets.layouts.davis import look_into_davis, verify_davis
from vitpipe.datasets.layouts.file_tree import DenseLayout
from vitpipe.datasets.layouts.image_headers import Look

__all__ = ["LOOK_INTO", "VERIFY_DENSE", "DenseLayout", "Look", "verify_ade20k", "verify_coco", "verify_davis"]

VERIFY_DENSE: dict[str, Callable[[Path], DenseLayout]] = {
    "coco": verify_coco,
    "ade20k": verify_ade20k,
    "davis": verify_davis,
}
LOOK_INTO: dict[str, Callable[[DenseLayout, int | None], Look]] = {
    "coco": look_into_coco,
    "ade20k": look_into_ade20k,
    "davis": look_into_davis,
}
