"""Supervised classification: mix > logits > soft-target cross entropy.

The fine-tuning of iTPN (arXiv 2211.12735, supplement, table 8), which is that of BEiT and MAE.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.data.batches import Batch
from vitpipe.data.mixup import Mixup
from vitpipe.methods.method import Draw, Method


class Classify(Method):
    """Trains a classifier on mixed images.

    Args:
        model: (B, 3, H, W) -> logits (B, K).
        mix: mixup, CutMix and label smoothing. They all give class probabilities as targets, hence the
            soft-target loss; without any of them it is ordinary cross entropy.
    """

    def __init__(self, model: nn.Module, mix: Mixup) -> None:
        super().__init__()
        self.model, self.mix = model, mix

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """`loss`: soft-target cross entropy, mean over the batch."""
        # Rank 0 on every rank: `chunk` counts micro-batches over all ranks, so the draw is the same whatever
        # the number of ranks.
        images, targets = self.mix(
            batch.images_BCHW, batch.labels_B, seed=draw.seed, step=draw.step, micro=draw.chunk, rank=0
        )
        return {"loss": soft_cross_entropy(self.model(images), targets)}


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Mean over the batch of -sum_k target_k log softmax_k, in float32; both (B, K) -> scalar."""
    # float32 under autocast too: bfloat16 has 8 bits, and the sum over 1000 classes of log-probabilities
    # needs more.
    return -(targets_BK * F.log_softmax(logits_BK.float(), dim=-1)).sum(dim=-1).mean()
