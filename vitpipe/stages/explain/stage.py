"""What a classifier looks at: clusters of the image, or attention, as pictures and tables.

data + weights > classifier > validation images > `ImageExplainer` > pictures, table
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitpipe.contracts.protocol import PROTOCOL, protocol_rows
from vitpipe.data.augment import eval_transform
from vitpipe.data.batches import ImageSet, eval_batches
from vitpipe.data.image_grid import optional_figure, write_grid
from vitpipe.evaluate.explain_images import ExplainSettings, Figure, ImageExplainer, ShownImage
from vitpipe.prepare.set_summary import read_set, readable_classes
from vitpipe.stages.context import StageContext
from vitpipe.stages.explain.config import ExplainConfig
from vitpipe.stages.training import measured_classifier, open_sets, trained_augment
from vitpipe.stages.weights_identity import dataset_read


def run(ctx: StageContext) -> dict[str, float]:
    """Explain some validation images by the `weights` input.

    Writes a figure for every image, `image_00040` of number 40, and the tables `clusters` and `protocol`; a
    network without clusters gets one figure, `attention`, and the table `images`.

    Returns:
        As `Explanation.metrics`.

    Raises:
        CheckpointError: when the weights are not those of a classifier of this recipe's model.
    """
    _, val_set = open_sets(ctx, used=("val",))
    model, _ = measured_classifier(ctx, val_set)
    model.eval()
    augment = trained_augment(ctx)
    mean, std = (torch.tensor(v, device=ctx.ranks.device).view(3, 1, 1) for v in (augment.mean, augment.std))

    def draw(figure: Figure) -> None:
        if not ctx.is_main:
            return
        with optional_figure(figure.name, ctx.logger.say):
            file = ctx.folder / f"{figure.name}.png"
            write_grid(file, figure.sections, columns=figure.columns, note=figure.note)
            ctx.logger.figure(figure.name, file)

    section: ExplainConfig = ctx.section
    explainer = ImageExplainer(
        model, _class_names(ctx, val_set.classes), (mean, std), settings_of(section), draw
    )
    shown = _chosen(ctx, val_set, (mean, std))
    has_clusters = bool(ctx.recipe.model.num_clusters)
    found = explainer.by_clusters(shown) if has_clusters else explainer.by_attention(shown)
    ctx.logger.table(found.table, found.rows)
    said = {
        "images": len(shown),
        "crop": f"{ctx.recipe.model.image_size} pixels, ratio {section.eval_crop_ratio:g}",
    }
    if has_clusters:
        is_cut = section.mask == "binary"
        mask = f"binary, cut at {section.threshold:g}" if is_cut else section.mask
        said |= {"stage": section.stage, "mask": mask}
    ctx.logger.table(PROTOCOL, protocol_rows(found.metrics, said))
    return found.metrics


def settings_of(section: ExplainConfig) -> ExplainSettings:
    """What of the section is about one image."""
    return ExplainSettings(section.stage, section.mask, section.threshold, section.columns, section.batch)


def _chosen(ctx: StageContext, val_set: ImageSet, normalisation: tuple[Tensor, Tensor]) -> list[ShownImage]:
    """The first images of different classes, then the first of the others; the same on every rank."""
    section: ExplainConfig = ctx.section
    mean, std = normalisation
    first: list[ShownImage] = []
    others: list[ShownImage] = []
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
            number, place = int(label), int(position)
            target = others if number in seen else first
            if len(target) < section.images:
                pixels = (image.to(mean.device) * std + mean).clamp(0.0, 1.0)
                target.append(
                    ShownImage(place, f"Validation image {place}", f"image_{place:05d}", pixels, number)
                )
            seen.add(number)
        if len(first) >= section.images:
            break
    return [*first, *others][: section.images]


def _class_names(ctx: StageContext, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the classes in words where the data has them (`digit zero`), else their keys."""
    dataset = dataset_read(ctx.stage, ctx.recipe, ctx.inputs)
    known = readable_classes(read_set(ctx.inputs["data"].path, dataset)) if dataset else {}
    return tuple(known.get(key, key) for key in keys)
