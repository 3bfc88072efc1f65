"""What PaCa's clusters have to do with the class: each masks the image, which is classified again.

Grainger et al., PaCa-ViT (CVPR 2023), supplement, section C and figures 6, 9 and 10. How a mask is made of an
assignment is not published; here (ours) a cluster's shares are stretched to 0 ... 1 and enlarged
bilinearly, so that there is no number to choose.

Shapes: M clusters, N patches, H x W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitpipe.models.network import Classifier

MaskKind = Literal["soft", "binary"]


@dataclass(frozen=True)
class MaskedCluster:
    """One cluster's masked image, classified again.

    Attributes:
        number: of the cluster, from 0.
        probability: of the true class.
        top_class: the class with the highest probability.
        is_positive: whether that is the true class.
    """

    number: int
    probability: float
    top_class: int
    is_positive: bool


@dataclass(frozen=True)
class ClusterExplanation:
    """An image by its clusters.

    Attributes:
        probability: of the true class for the whole image.
        top_class: for the whole image.
        masks: (M, H, W), 0 ... 1.
        clusters: positive ones first, each group by falling probability; equals by number.
    """

    probability: float
    top_class: int
    masks: Tensor
    clusters: tuple[MaskedCluster, ...]

    @property
    def positive(self) -> tuple[MaskedCluster, ...]:
        """The clusters whose masked image is still classified as the true class."""
        return tuple(cluster for cluster in self.clusters if cluster.is_positive)

    @property
    def negative(self) -> tuple[MaskedCluster, ...]:
        """The other clusters. Their first ones may have a higher probability than some positive ones."""
        return tuple(cluster for cluster in self.clusters if not cluster.is_positive)


def cluster_masks(
    shares_MN: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    kind: MaskKind = "soft",
    threshold: float = 0.5,
) -> Tensor:
    """Each cluster's shares of the patches as a mask of the image, (M, H, W) in 0 ... 1.

    Args:
        shares_MN: assignment of one image.
        grid: rows and columns of patches.
        size: H and W.
        kind: `binary` is 1 where the soft mask reaches `threshold`.
    """
    low, high = shares_MN.amin(1, keepdim=True), shares_MN.amax(1, keepdim=True)
    # A cluster that takes all patches alike masks nothing.
    stretched = torch.where(high > low, (shares_MN - low) / (high - low).clamp(min=1e-30), 1.0)
    maps = stretched.unflatten(1, grid).unsqueeze(1)
    masks = F.interpolate(maps, size=size, mode="bilinear", align_corners=False).squeeze(1)
    return (masks >= threshold).to(masks.dtype) if kind == "binary" else masks


@torch.no_grad()
def explain_by_clusters(
    model: Classifier,
    image_3HW: Tensor,
    label: int,
    stage: int,
    normalisation: tuple[Tensor, Tensor],
    *,
    kind: MaskKind = "soft",
    threshold: float = 0.5,
    batch: int = 32,
) -> ClusterExplanation:
    """Mask an image by each cluster of a stage and classify it again.

    Args:
        model: in evaluation mode.
        image_3HW: in 0 ... 1; the mask is applied before the normalisation, what is masked out is black.
        label: the true class.
        stage: from 1.
        normalisation: mean and deviation, (3, 1, 1) each.
        kind, threshold: as `cluster_masks`.
        batch: masked images in one forward pass.

    Raises:
        InputError: when the network has no clusters in this stage.
    """
    mean, std = normalisation

    def probabilities(images: Tensor) -> Tensor:
        return model((images - mean) / std).float().softmax(-1)

    whole = probabilities(image_3HW[None])[0]
    shares, grid = model.assignment(((image_3HW - mean) / std)[None], stage)
    size = (image_3HW.shape[1], image_3HW.shape[2])
    masks = cluster_masks(shares[0].float(), grid, size, kind=kind, threshold=threshold)
    found = torch.cat([probabilities(part[:, None] * image_3HW) for part in masks.split(batch)]).cpu()
    clusters = [
        MaskedCluster(number, float(row[label]), int(row.argmax()), int(row.argmax()) == label)
        for number, row in enumerate(found)
    ]
    ordered = sorted(clusters, key=lambda c: (not c.is_positive, -c.probability, c.number))
    return ClusterExplanation(float(whole[label]), int(whole.argmax()), masks, tuple(ordered))
