"""Test-time augmentation: predictions over several sizes of an image, also mirrored. K classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class MergedSizes(nn.Module):
    """Predicts the class with the largest mean score over all versions of an image.

    Args:
        segmentor: mmseg's.
        softmax: whether its scores are logits, as UPerNet's are; Mask2Former's are sums of probabilities.
    """

    def __init__(self, segmentor: nn.Module, *, softmax: bool) -> None:
        super().__init__()
        self.segmentor, self.softmax = segmentor, softmax

    def test_step(self, batch: Mapping[str, Sequence[Any]]) -> list[Any]:
        """One image in the versions of `multi_scale_pipeline` -> its sample with the merged prediction."""
        total_KHW, merged = torch.zeros(()), None
        for inputs, samples in zip(batch["inputs"], batch["data_samples"], strict=True):
            step = self.segmentor.test_step({"inputs": inputs, "data_samples": samples})  # type: ignore[operator]
            (merged,) = step
            # mmseg has resized the scores to the original size and flipped them back.
            scores_KHW = merged.seg_logits.data
            # Probabilities, not logits: one very certain version would outweigh the others.
            total_KHW = (scores_KHW.softmax(0) if self.softmax else scores_KHW) + total_KHW.to(scores_KHW)
        assert merged is not None
        merged.pred_sem_seg.data = total_KHW.argmax(0, keepdim=True)
        return [merged]
