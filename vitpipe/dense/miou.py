"""Mean intersection over union by mmseg's IoUMetric, summed exactly and not rounded. Ratios in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitpipe.dense.segmentor import IGNORED


@dataclass(frozen=True)
class SegmentResult:
    """mIoU and mAcc (means over classes), aAcc (over pixels); IoU, Acc and true pixels of each class.

    A class that neither occurs nor is predicted has NaN and does not count.
    """

    mean_iou: float
    mean_acc: float
    all_acc: float
    class_iou: tuple[float, ...]
    class_acc: tuple[float, ...]
    class_pixels: tuple[int, ...]


class PixelCounts:
    """Pixels per class in the intersection, union, prediction and truth: `total` is (4, K) float64."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.total = torch.zeros(4, num_classes, dtype=torch.float64)

    def add(self, sample: Any) -> None:
        """Count one of mmseg's samples, with `pred_sem_seg` and `gt_sem_seg` of the picture's own size."""
        from mmseg.evaluation import IoUMetric

        found = sample.pred_sem_seg.data.squeeze()
        truth = sample.gt_sem_seg.data.squeeze().to(found)
        areas = IoUMetric.intersect_and_union(found, truth, self.num_classes, IGNORED)
        self.total += torch.stack([area.double() for area in areas])

    def result(self, total: Tensor | None = None) -> SegmentResult:
        """The numbers, of this rank's counts or of the given sum over all ranks."""
        from mmseg.evaluation import IoUMetric

        areas = self.total if total is None else total
        values = IoUMetric.total_area_to_metrics(*areas, ["mIoU"])
        class_iou, class_acc = (torch.from_numpy(values[name]) for name in ("IoU", "Acc"))
        return SegmentResult(
            mean_iou=float(class_iou.nanmean()),
            mean_acc=float(class_acc.nanmean()),
            all_acc=float(values["aAcc"]),
            class_iou=tuple(class_iou.tolist()),
            class_acc=tuple(class_acc.tolist()),
            class_pixels=tuple(int(count) for count in areas[3]),
        )
