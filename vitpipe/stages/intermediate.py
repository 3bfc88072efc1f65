"""Intermediate fine-tuning on the larger label set (ImageNet-22K): the work of finetune, other classes."""

from __future__ import annotations

from vitpipe.stages.context import StageContext
from vitpipe.stages.training import train_classifier


def run(ctx: StageContext) -> dict[str, float]:
    """Train on `imagenet22k` from the pre-trained weights; see `train_classifier`."""
    return train_classifier(ctx)
