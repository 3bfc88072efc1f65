"""What a classifier looks at: clusters of the image, or attention, as pictures and tables.

data + weights > classifier > validation images > masked by each cluster > classified again > picture, table
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.protocol import PROTOCOL, protocol_rows
from vitpipe.data.augment import eval_transform
from vitpipe.data.batches import ImageSet, eval_batches
from vitpipe.data.image_grid import Pixels, Section, Tile, fit, optional_figure, write_grid
from vitpipe.evaluate.cluster_pictures import ClusterExplanation, explain_by_clusters
from vitpipe.models.build import stored_classifier
from vitpipe.models.network import Classifier
from vitpipe.models.transfer import load_same
from vitpipe.stages.context import StageContext
from vitpipe.stages.explain.config import ExplainConfig
from vitpipe.stages.training import open_sets, trained_augment

_TILE = 112  # pixels


@dataclass(frozen=True)
class _Shown:
    """One validation image, its pixels in 0 ... 1."""

    position: int
    pixels: Tensor  # (3, H, W)
    label: int


def run(ctx: StageContext) -> dict[str, float]:
    """Explain some validation images by the `weights` input.

    Writes a figure for every image, `image_00040` of number 40, and the tables `clusters` and `protocol`; a
    network without clusters gets one figure, `attention`, and the table `images`.

    Returns:
        With clusters `positive_share`, the share of clusters by which the images are still classified
        rightly, and `probability`, the mean of the true class for whole images; without clusters the latter
        only.

    Raises:
        CheckpointError: when the weights are not those of a classifier of this recipe's model.
    """
    section: ExplainConfig = ctx.section
    _, val_set = open_sets(ctx, used=("val",))
    path = ctx.inputs["weights"].weights
    build, state = stored_classifier(ctx.recipe.model, path)
    model = build()
    load_same(model, state, path)
    model.to(ctx.ranks.device).eval()
    augment = trained_augment(ctx)
    normalisation = tuple(
        torch.tensor(v, device=ctx.ranks.device).view(3, 1, 1) for v in (augment.mean, augment.std)
    )
    shown, names = _chosen(ctx, val_set, normalisation), _class_names(ctx, val_set.classes)
    if ctx.recipe.model.num_clusters:
        metrics = _by_clusters(ctx, model, shown, normalisation, names)
    else:
        metrics = _by_attention(ctx, model, shown, normalisation, names)
    settings = {
        "images": len(shown),
        "crop": f"{ctx.recipe.model.image_size} pixels, ratio {section.eval_crop_ratio:g}",
    }
    if ctx.recipe.model.num_clusters:
        is_cut = section.mask == "binary"
        settings |= {
            "stage": section.stage,
            "mask": f"binary, cut at {section.threshold:g}" if is_cut else section.mask,
        }
    ctx.logger.table(PROTOCOL, protocol_rows(metrics, settings))
    return metrics


def _chosen(ctx: StageContext, val_set: ImageSet, normalisation: tuple[Tensor, ...]) -> list[_Shown]:
    """The first images of different classes, then the first of the others; the same on every rank."""
    section: ExplainConfig = ctx.section
    mean, std = normalisation
    first: list[_Shown] = []
    others: list[_Shown] = []
    seen: set[int] = set()
    batches = eval_batches(
        val_set,
        eval_transform(ctx.recipe.model.image_size, section.eval_crop_ratio, trained_augment(ctx)),
        batch=section.batch,
        # All of them on every rank: shares of the set would give each its own images.
        rank=0,
        num_ranks=1,
        workers=0,
        seed=ctx.recipe.seed,
    )
    for batch in batches:
        for image, label, position in zip(batch.images, batch.labels_B, batch.indices_B, strict=True):
            number = int(label)
            pixels = (image.to(mean.device) * std + mean).clamp(0.0, 1.0)
            target = others if number in seen else first
            if len(target) < section.images:
                target.append(_Shown(int(position), pixels, number))
            seen.add(number)
        if len(first) >= section.images:
            break
    return [*first, *others][: section.images]


def _by_clusters(
    ctx: StageContext,
    model: Classifier,
    shown: list[_Shown],
    normalisation: tuple[Tensor, ...],
    classes: tuple[str, ...],
) -> dict[str, float]:
    section: ExplainConfig = ctx.section
    rows: list[dict[str, Any]] = []
    probabilities, shares = [], []
    for image in shown:
        found = explain_by_clusters(
            model,
            image.pixels,
            image.label,
            section.stage,
            (normalisation[0], normalisation[1]),
            kind=section.mask,
            threshold=section.threshold,
            batch=section.batch,
        )
        rows += _rows(image, found, classes)
        probabilities.append(found.probability)
        shares.append(len(found.positive) / len(found.clusters))
        if ctx.is_main:
            _draw_clusters(ctx, image, found, classes)
    ctx.logger.table("clusters", rows)
    return {"positive_share": float(np.mean(shares)), "probability": float(np.mean(probabilities))}


def _rows(image: _Shown, found: ClusterExplanation, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for group, clusters in (("positive", found.positive), ("negative", found.negative)):
        for rank, cluster in enumerate(clusters, start=1):
            rows.append(
                {
                    "image": image.position,
                    "class": classes[image.label],
                    "group": group,
                    "rank": rank,
                    "cluster": cluster.number,
                    "probability": cluster.probability,
                    "difference": cluster.probability - found.probability,
                    "top_class": classes[cluster.top_class],
                    "whole_image_top_class": classes[found.top_class],
                }
            )
    return rows


def _draw_clusters(
    ctx: StageContext, image: _Shown, found: ClusterExplanation, classes: tuple[str, ...]
) -> None:
    """The image, then the masked images of the positive group, and those of the negative one in new rows."""
    section: ExplainConfig = ctx.section
    name, own = f"image_{image.position:05d}", classes[image.label]
    pictures = found.masks[:, None] * image.pixels

    def tiles(clusters: Any) -> list[Tile]:
        return [Tile(_pixels(pictures[c.number]), f"{c.probability:.3f}") for c in clusters]

    whole = Tile(_pixels(image.pixels), f"{found.probability:.3f}")
    is_right = found.top_class == image.label
    said = "" if is_right else f", classified as {classes[found.top_class]}"
    sections = [
        Section(
            f"{own}{said}: the image, and clusters that are classified as {own}",
            [whole, *tiles(found.positive)],
        ),
        Section(f"clusters that are not classified as {own}", tiles(found.negative)),
    ]
    note = (
        f"Validation image {image.position} ({own}{said}) masked by each of the {len(found.clusters)} "
        f"clusters of stage {section.stage} and classified again; below each the probability of {own}, "
        "falling within each group. The first picture is the image without a mask."
    )
    with optional_figure(name, ctx.logger.say):
        path = ctx.folder / f"{name}.png"
        write_grid(path, sections, columns=section.columns, note=note)
        ctx.logger.figure(name, path)


def _by_attention(
    ctx: StageContext,
    model: Classifier,
    shown: list[_Shown],
    normalisation: tuple[Tensor, ...],
    classes: tuple[str, ...],
) -> dict[str, float]:
    mean, std = normalisation
    rows: list[dict[str, Any]] = []
    tiles: list[Tile] = []
    with torch.no_grad():
        for image in shown:
            given = ((image.pixels - mean) / std)[None]
            probability = model(given).float().softmax(-1)[0]
            looks = model.image_attention(given)
            if looks is None:
                raise InputError(
                    f"The {model.family} network has no attention of an image vector",
                    where="stages, model",
                    fix="remove the stage explain",
                )
            top = int(probability.argmax())
            own, chance = classes[image.label], float(probability[image.label])
            rows.append(
                {"image": image.position, "class": own, "probability": chance, "top_class": classes[top]}
            )
            look = F.interpolate((looks / looks.amax())[None], size=image.pixels.shape[1:], mode="nearest")[0]
            tiles += [
                Tile(_pixels(image.pixels), f"{own}: {chance:.3f}"),
                Tile(_pixels(look.expand(3, -1, -1)), classes[top]),
            ]
    ctx.logger.table("images", rows)
    if ctx.is_main:
        with optional_figure("attention", ctx.logger.say):
            path = ctx.folder / "attention.png"
            note = (
                "Validation images with the probability of their class, and how much of each patch the "
                "vector of the image takes in the last block, mean of the heads, white for the most; below "
                "it the class that the network gives."
            )
            write_grid(path, [Section("", tiles, ("image", "attention"))], columns=2, note=note)
            ctx.logger.figure("attention", path)
    return {"probability": float(np.mean([row["probability"] for row in rows]))}


def _pixels(image_3HW: Tensor) -> Pixels:
    """(3, H, W) in 0 ... 1 as the array of a tile."""
    array = (image_3HW.permute(1, 2, 0).cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return fit(array, _TILE)


def _class_names(ctx: StageContext, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the classes in words where the data has them (`digit zero`), else their keys."""
    rows = ctx.inputs["data"].tables().get("classes", [])
    known = {row["class"]: row["name"] for row in rows if row.get("class") and row.get("name")}
    return tuple(known.get(key, key) for key in keys)
