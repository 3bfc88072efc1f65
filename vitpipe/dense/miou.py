"""Mean intersection over union (mIoU) by mmseg's IoUMetric, without its rounding. Ratios in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitpipe.dense.segmentor import IGNORED


@dataclass(frozen=True)
class SegmentResult:
    """mIoU and mAcc (means over classes), aAcc (over pixels); IoU, Acc and ground-truth pixels by class.

    A class that neither occurs nor is predicted has NaN and is left out of the means.
    """

    mean_iou: float
    mean_acc: float
    all_acc: float
    class_iou: tuple[float, ...]
    class_acc: tuple[float, ...]
    class_pixels: tuple[int, ...]


class PixelCounts:
    """Pixels per class in intersection, union, prediction and ground truth: `total` is (4, K) float64."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        # Float64 counts pixels exactly up to 2^53; mmseg sums in float32, which loses pixels above 2^24.
        self.total = torch.zeros(4, num_classes, dtype=torch.float64)

    def add(self, sample: Any) -> None:
        """Add one `SegDataSample` whose `pred_sem_seg` and `gt_sem_seg` have the image's original size."""
        from mmseg.evaluation import IoUMetric

        found = sample.pred_sem_seg.data.squeeze()
        truth = sample.gt_sem_seg.data.squeeze().to(found)
        areas = IoUMetric.intersect_and_union(found, truth, self.num_classes, IGNORED)
        self.total += torch.stack([area.double() for area in areas])

    def result(self, total: Tensor | None = None) -> SegmentResult:
        """Compute the metrics of this rank's counts, or of the given sum over all ranks (4, K)."""
        from mmseg.evaluation import IoUMetric

        areas = self.total if total is None else total
        values = IoUMetric.total_area_to_metrics(*areas, ["mIoU"])
        # IoUMetric's own means are rounded to two digits of a percentage; these are not.
        class_iou, class_acc = (torch.from_numpy(values[name]) for name in ("IoU", "Acc"))
        return SegmentResult(
            mean_iou=float(class_iou.nanmean()),
            mean_acc=float(class_acc.nanmean()),
            all_acc=float(values["aAcc"]),
            class_iou=tuple(class_iou.tolist()),
            class_acc=tuple(class_acc.tolist()),
            class_pixels=tuple(int(count) for count in areas[3]),
        )
