"""What a classifier looks at in some images: numbers for a table and sections for a picture.

images > masked by each cluster, or the attention of the image vector > classified > rows, pictures

The stage `explain` shows validation images by it, `vitpipe explain` the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.data.image_grid import Pixels, Section, Tile, fit
from vitpipe.evaluate.cluster_pictures import (
    ClusterExplanation,
    MaskedCluster,
    MaskKind,
    explain_by_clusters,
)
from vitpipe.models.network import Classifier

_TILE = 112  # pixels
# Characters of a class's name: own sets may have sentences as names; the table has them in full.
_MOST_OF_TITLE, _MOST_OF_CAPTION = 32, 12
_ATTENTION = "attention"  # the figure of all images together


@dataclass(frozen=True)
class ShownImage:
    """One image.

    Attributes:
        key: names it in tables, a number or a file name.
        title: names it in a sentence, for example `Validation image 40`.
        figure: name of its picture.
        pixels: (3, H, W) in 0 ... 1, cropped as for classification.
        label: the class whose probability is shown.
        is_predicted: the label is no annotation but what the network says of the image.
    """

    key: int | str
    title: str
    figure: str
    pixels: Tensor
    label: int
    is_predicted: bool = False


@dataclass(frozen=True)
class ExplainSettings:
    """How images are explained; see `stages/explain/config.py`."""

    stage: int = 3
    mask: MaskKind = "soft"
    threshold: float = 0.5
    columns: int = 10
    batch: int = 32


@dataclass(frozen=True)
class Figure:
    """A picture to be written by `write_grid`."""

    name: str
    sections: tuple[Section, ...]
    columns: int
    note: str


@dataclass
class Explanation:
    """What was found.

    Attributes:
        table: name of the table.
        rows: of the table.
        metrics: with clusters `positive_share`, the share of clusters by which the images are still
            classified rightly, and `probability`, the mean of the label's class for whole images; without
            clusters the latter only.
    """

    table: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class ImageExplainer:
    """Explains images by a classifier.

    Args:
        model: in evaluation mode.
        classes: readable names of its classes.
        normalisation: mean and deviation, (3, 1, 1) each, on the model's device.
        settings: see `ExplainSettings`.
        draw: takes every figure as soon as it is there.
    """

    def __init__(
        self,
        model: Classifier,
        classes: Sequence[str],
        normalisation: tuple[Tensor, Tensor],
        settings: ExplainSettings,
        draw: Callable[[Figure], None],
    ) -> None:
        self.model, self.classes, self.settings, self.draw = model, tuple(classes), settings, draw
        self.mean, self.std = normalisation

    @torch.no_grad()
    def probabilities(self, image_3HW: Tensor) -> Tensor:
        """Probabilities of the classes for one image in 0 ... 1, (K)."""
        return self.model(self._normalised(image_3HW)).float().softmax(-1)[0]

    def by_clusters(self, images: Sequence[ShownImage]) -> Explanation:
        """Mask every image by each cluster of a stage and classify it again; a figure an image.

        Raises:
            InputError: when the network has no clusters in this stage.
        """
        explanation, shares, probabilities = Explanation("clusters"), [], []
        for image in images:
            found = explain_by_clusters(
                self.model,
                image.pixels,
                image.label,
                self.settings.stage,
                (self.mean, self.std),
                kind=self.settings.mask,
                threshold=self.settings.threshold,
                batch=self.settings.batch,
            )
            explanation.rows += self._cluster_rows(image, found)
            probabilities.append(found.probability)
            shares.append(len(found.positive) / len(found.clusters))
            self.draw(self._cluster_figure(image, found))
        explanation.metrics = {
            "positive_share": float(np.mean(shares)),
            "probability": float(np.mean(probabilities)),
        }
        return explanation

    def by_attention(self, images: Sequence[ShownImage]) -> Explanation:
        """Show how much of each patch the image's vector takes in the last block; one figure for all.

        Raises:
            InputError: when the network has no attention of an image vector.
        """
        explanation, tiles = Explanation("images"), []
        for image in images:
            probability = self.probabilities(image.pixels)
            with torch.no_grad():
                looks = self.model.image_attention(self._normalised(image.pixels))
            if looks is None:
                raise InputError(
                    f"The {self.model.family} network has no attention of an image vector",
                    where="stages, model",
                    fix="take a network of paca or vit, or remove the stage explain",
                )
            top = self.classes[int(probability.argmax())]
            own, chance = self.classes[image.label], float(probability[image.label])
            row = {"image": image.key, "class": own, "probability": chance, "top_class": top}
            explanation.rows.append(row)
            size = image.pixels.shape[1:]
            look = F.interpolate((looks / looks.amax())[None], size=size, mode="nearest")[0]
            tiles += [
                Tile(_pixels(image.pixels), f"{_cut(own, _MOST_OF_CAPTION)}: {chance:.3f}"),
                Tile(_pixels(look.expand(3, -1, -1)), _cut(top, _MOST_OF_CAPTION)),
            ]
        note = (
            "Images with the probability of their class, and how much of each patch the vector of the image "
            "takes in the last block, mean of the heads, white for the most; below it the class that the "
            "network gives."
        )
        section = Section("", tiles, ("image", "attention"))
        self.draw(Figure(_ATTENTION, (section,), 2, note))
        explanation.metrics = {"probability": float(np.mean([r["probability"] for r in explanation.rows]))}
        return explanation

    def _normalised(self, image_3HW: Tensor) -> Tensor:
        return ((image_3HW - self.mean) / self.std)[None]

    def _cluster_rows(self, image: ShownImage, found: ClusterExplanation) -> list[dict[str, Any]]:
        return [
            {
                "image": image.key,
                "class": self.classes[image.label],
                "group": group,
                "rank": rank,
                "cluster": cluster.number,
                "probability": cluster.probability,
                "difference": cluster.probability - found.probability,
                "top_class": self.classes[cluster.top_class],
                "whole_image_top_class": self.classes[found.top_class],
            }
            for group, clusters in (("positive", found.positive), ("negative", found.negative))
            for rank, cluster in enumerate(clusters, start=1)
        ]

    def _cluster_figure(self, image: ShownImage, found: ClusterExplanation) -> Figure:
        """The image, the masked images of the positive group, and those of the negative one in new rows."""
        own = self.classes[image.label]
        pictures = found.masks[:, None] * image.pixels

        def tiles(clusters: Sequence[MaskedCluster]) -> list[Tile]:
            return [Tile(_pixels(pictures[c.number]), f"{c.probability:.3f}") for c in clusters]

        whole = Tile(_pixels(image.pixels), f"{found.probability:.3f}")
        said = (
            ""
            if found.top_class == image.label
            else f", classified as {_cut(self.classes[found.top_class], _MOST_OF_TITLE)}"
        )
        short = _cut(own, _MOST_OF_TITLE)
        among = "no cluster is classified so"
        if found.positive:
            among = f"and clusters that are classified as {short}"
        sections = (
            Section(f"{short}{said}: the image, {among}", [whole, *tiles(found.positive)]),
            Section(f"clusters that are not classified as {short}", tiles(found.negative)),
        )
        source = ", as the network classifies it" if image.is_predicted else ""
        note = (
            f"{image.title} ({own}{source}{said}) masked by each of the {len(found.clusters)} clusters of "
            f"the first block of stage {self.settings.stage} and classified again; below each the "
            f"probability of {own}, falling within each group. The first picture is the image without a mask."
        )
        return Figure(image.figure, sections, self.settings.columns, note)


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _pixels(image_3HW: Tensor) -> Pixels:
    """(3, H, W) in 0 ... 1 as the array of a tile."""
    array = (image_3HW.permute(1, 2, 0).cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return fit(array, _TILE)
