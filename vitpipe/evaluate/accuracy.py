"""Accuracy of a classifier; exact for any number of ranks, because every image counts once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.config.resolve import Precision
from vitpipe.data.batches import Batch
from vitpipe.train.precision import autocast
from vitpipe.train.ranks import Ranks

# int64 takes 8 bytes per pair of classes: 32 MB for 2,000 classes, 3.8 GB for ImageNet-22K's 21,841.
_MAX_CONFUSION_CLASSES = 2000


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a classifier on one set.

    Attributes:
        num_images: over all ranks.
        top1: share of images in [0, 1] whose class has the highest logit.
        top5: share of images whose class is among the 5 highest; 1 with fewer than 6 classes.
        loss: mean cross entropy against the hard labels, without label smoothing.
        class_counts: (K, 3), images, top-1 hits, top-5 hits of each true class, int64.
        confusion: (K, K), images by true (row) and predicted (column) class; `None` above 2000 classes.
    """

    num_images: int
    top1: float
    top5: float
    loss: float
    class_counts: Tensor
    confusion: Tensor | None

    def metrics(self) -> dict[str, float]:
        """`top1`, `top5` and `loss` by name."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}

    def class_rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """One row per class: class, images, top1, top5 (both empty for a class without images)."""
        rows = []
        for name, (images, hits1, hits5) in zip(classes, self.class_counts.tolist(), strict=True):
            shares = {"top1": hits1 / images, "top5": hits5 / images} if images else {"top1": "", "top5": ""}
            rows.append({"class": name, "images": images, **shares})
        return rows

    def confusion_rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """One row per pair of classes that occurs: true, predicted, images; no rows without a matrix."""
        if self.confusion is None:
            return []
        # Non-zero entries only: of ImageNet's million pairs most never occur.
        return [
            {"true": classes[true], "predicted": classes[predicted], "images": int(images)}
            for true, predicted in self.confusion.nonzero().tolist()
            if (images := self.confusion[true, predicted])
        ]


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module, batches: Iterable[Batch], num_classes: int, *, ranks: Ranks, precision: Precision
) -> Accuracy:
    """Evaluate a classifier on this rank's batches and sum the counts over all ranks.

    Args:
        model: (B, 3, H, W) -> logits (B, K), on the ranks' device; runs in evaluation mode and is left in the
            mode that it had.
        batches: this rank's share; shares of different ranks must not overlap and may differ in length.
        num_classes: K.
        precision: of the forward pass.
    """
    # Counts and no means: they add up exactly, whatever the sizes of batches and shares. torch's
    # DistributedSampler would repeat images to make shares equal.
    was_training = model.training
    model.eval()
    per_class_K3 = torch.zeros(num_classes, 3, dtype=torch.int64)
    side = num_classes if num_classes <= _MAX_CONFUSION_CLASSES else 0
    confusion_KK = torch.zeros(side, side, dtype=torch.int64)
    total_loss = torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        with autocast(ranks.device, precision):
            logits_BK = model(batch.images.to(ranks.device)).float().cpu()
        labels_B = batch.labels_B.cpu()
        # In float64: a float32 sum over a million images would depend on how they are cut into batches.
        total_loss += F.cross_entropy(logits_BK.double(), labels_B, reduction="sum")
        best_B5 = logits_BK.topk(min(5, num_classes), dim=1).indices
        hits_B5 = best_B5 == labels_B[:, None]
        counts_B3 = torch.stack([torch.ones_like(labels_B), hits_B5[:, 0], hits_B5.any(dim=1)], dim=1)
        per_class_K3.index_add_(0, labels_B, counts_B3.long())
        if side:
            # Row-major index of (true, predicted).
            pairs = labels_B * side + best_B5[:, 0]
            confusion_KK += torch.bincount(pairs, minlength=side * side).view(side, side)
    model.train(was_training)

    # One exchange after the loop: ranks may have different numbers of batches.
    per_class_K3, confusion_KK = ranks.sum(per_class_K3), ranks.sum(confusion_KK)
    num_images, hits1, hits5 = per_class_K3.sum(dim=0).tolist()
    return Accuracy(
        num_images=num_images,
        # An empty set gives 0 and no division by zero.
        top1=hits1 / max(num_images, 1),
        top5=hits5 / max(num_images, 1),
        loss=float(ranks.sum(total_loss)) / max(num_images, 1),
        class_counts=per_class_K3,
        confusion=confusion_KK if side else None,
    )
