"""mIoU and accuracies, against a confusion matrix counted by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from vitpipe.dense.miou import PixelCounts
from vitpipe.dense.mm_import import open_segmentation

pytestmark = pytest.mark.dense


def sample(found, truth):
    return SimpleNamespace(
        pred_sem_seg=SimpleNamespace(data=torch.tensor(found)[None]),
        gt_sem_seg=SimpleNamespace(data=torch.tensor(truth)[None]),
    )


def test_numbers_by_hand():
    open_segmentation()
    counts = PixelCounts(4)
    counts.add(sample([[0, 0, 1], [1, 1, 2]], [[0, 0, 0], [1, 255, 1]]))
    counts.add(sample([[2, 2]], [[2, 255]]))
    result = counts.result()
    # Class 0: 2 of 3 found; class 1: 1 of 2, one wrong; class 2: 1 of 1, one wrong; class 3 never occurs.
    assert result.class_iou[:3] == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert result.class_acc[:3] == pytest.approx([2 / 3, 1 / 2, 1.0])
    assert math.isnan(result.class_iou[3])
    assert result.mean_iou == pytest.approx((2 / 3 + 1 / 3 + 1 / 2) / 3)
    assert result.mean_acc == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert result.all_acc == pytest.approx(4 / 6)
    assert result.class_pixels == (3, 2, 1, 0)


def test_sum_of_ranks_is_the_whole():
    open_segmentation()
    generator = torch.Generator().manual_seed(0)
    maps = [[torch.randint(0, 3, (5, 7), generator=generator).tolist() for _ in range(2)] for _ in range(4)]
    whole, first, second = PixelCounts(3), PixelCounts(3), PixelCounts(3)
    for number, (found, truth) in enumerate(maps):
        whole.add(sample(found, truth))
        (first if number % 2 else second).add(sample(found, truth))
    assert first.result(first.total + second.total) == whole.result()
