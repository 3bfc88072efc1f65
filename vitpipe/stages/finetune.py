"""Fine-tuning on ImageNet-1K, from the intermediate or the pre-trained weights."""

from __future__ import annotations

from vitpipe.stages.context import StageContext
from vitpipe.stages.training import train_classifier


def run(ctx: StageContext) -> dict[str, float]:
    """Train on `imagenet` and measure on its validation set; see `train_classifier`."""
    return train_classifier(ctx)
