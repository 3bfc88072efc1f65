"""A segmentor's answer over several sizes of a picture and their mirror images. Shapes: K classes, H, W."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class MergedSizes(nn.Module):
    """Answers with the class of the largest mean score over all versions of a picture.

    Args:
        segmentor: mmseg's.
        softmax: whether its scores are logits; Mask2Former's are not.
    """

    def __init__(self, segmentor: nn.Module, *, softmax: bool) -> None:
        super().__init__()
        self.segmentor, self.softmax = segmentor, softmax

    def test_step(self, batch: Mapping[str, Sequence[Any]]) -> list[Any]:
        """One picture in the versions of `segment.multi_scale_pipeline` -> its sample, prediction merged."""
        total_KHW, merged = torch.zeros(()), None
        for inputs, samples in zip(batch["inputs"], batch["data_samples"], strict=True):
            step = self.segmentor.test_step({"inputs": inputs, "data_samples": samples})  # type: ignore[operator]
            (merged,) = step
            # At the picture's own size, and mirrored back.
            scores_KHW = merged.seg_logits.data
            total_KHW = (scores_KHW.softmax(0) if self.softmax else scores_KHW) + total_KHW.to(scores_KHW)
        assert merged is not None
        merged.pred_sem_seg.data = total_KHW.argmax(0, keepdim=True)
        return [merged]
