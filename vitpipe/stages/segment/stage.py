"""Semantic segmentation on ADE20K with a head on the pre-trained network.

data + weights > segmentor > train > mIoU, aAcc, mAcc > table, figure, weights
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from vitpipe.config.dense_sections import SegmentConfig
from vitpipe.contracts.protocol import PIXEL_IOU, PROTOCOL, protocol_rows
from vitpipe.contracts.units import counted
from vitpipe.data.image_grid import (
    Section,
    Tile,
    class_colours,
    draw_labels,
    fit,
    legend_of,
    optional_figure,
    write_grid,
)
from vitpipe.data.image_pixels import rgb_file
from vitpipe.datasets.dense_folder import DenseFolder, open_dense
from vitpipe.dense.head import segmentation_head
from vitpipe.dense.miou import PixelCounts, SegmentResult
from vitpipe.dense.mm_import import open_segmentation
from vitpipe.dense.multi_scale import MergedSizes
from vitpipe.dense.segmentor import (
    ade_dataset,
    build_segmentor,
    eval_pipeline,
    multi_scale_pipeline,
    segmentor_config,
    train_pipeline,
)
from vitpipe.stages.context import StageContext
from vitpipe.stages.segment.config import STAGE
from vitpipe.stages.used_datasets import record_datasets

_NUM_DRAWN, _TILE = 4, 320


def run(ctx: StageContext) -> dict[str, float]:
    """Train and evaluate the segmentor.

    Writes `weights.safetensors` (backbone, pyramid and heads), `mm_config.json`, the tables `weights_account`
    and `per_class`, and the figure `predictions`.

    Returns:
        `mIoU`, `mAcc` (means over classes) and `aAcc` (over pixels), ratios in [0, 1]; with
        `multi_scale_ratios` also `multi_scale_mIoU` and so on, from several sizes (and their mirror images).
        `params` counts those of the whole segmentor.

    Raises:
        DatasetError: ADE20K is missing or damaged.
        CheckpointError: the starting weights do not fit.
        RunError: mmseg is not installed.
    """
    section: SegmentConfig = ctx.section
    # First: the modules imported below import mmengine, whose absence should be reported as a RunError.
    head = segmentation_head(section.head)
    open_segmentation(head.packages)
    from vitpipe.stages.dense_training import fit_dense, measure_dense, plan_dense, save_config
    from vitpipe.stages.training import seed_model, start_from_weights

    folder = open_dense(ctx.inputs["data"].path, section.dataset, ctx.state / "data", STAGE.reads)
    record_datasets(ctx, section.dataset)
    pipelines = {"train": train_pipeline(section), "val": eval_pipeline(section)}
    if section.multi_scale_ratios:
        pipelines["val_multi_scale"] = multi_scale_pipeline(section)
    sets = {
        name: ade_dataset(folder, "train" if name == "train" else "val", steps)
        for name, steps in pipelines.items()
    }
    plan, norm = plan_dense(ctx, sets["train"], needs_two_images=head.needs_two_images)
    config = segmentor_config(section, ctx.recipe.model, num_classes=len(folder.classes), norm=norm)
    save_config(ctx, network=config, pipelines=pipelines)
    # Directly before the network is built: `segmentor_config` has built one, too, to read its widths.
    seed_model(ctx)
    segmentor = build_segmentor(config, section)
    segmentor.init_weights()
    start = start_from_weights(ctx, segmentor.backbone.net)
    segmentor.to(ctx.ranks.device)
    state = fit_dense(ctx, segmentor, plan, sets["train"], norm=norm, start=start)

    def measured(prefix: str) -> dict[str, float]:
        metrics = _evaluate(ctx, state.method.model, sets["val"], folder, prefix)
        if section.multi_scale_ratios:
            merged = MergedSizes(state.method.model, softmax=head.gives_logits)
            metrics |= _evaluate_multi_scale(ctx, merged, sets["val_multi_scale"], folder, prefix)
        return metrics

    # With the class names: the file alone says what its class numbers mean.
    return measure_dense(ctx, state, measured, classes=json.dumps(folder.classes))


def _evaluate(
    ctx: StageContext, segmentor: Any, val_set: Any, folder: DenseFolder, prefix: str
) -> dict[str, float]:
    """Predict, count pixels, write the table and the figure; every rank returns the metrics."""
    from vitpipe.stages.dense_training import counted_params, predictions

    counts = PixelCounts(len(folder.classes))
    drawn: list[Any] = []
    for sample in predictions(ctx, segmentor, val_set):
        counts.add(sample)
        if len(drawn) < _NUM_DRAWN:
            drawn.append(sample)
    # Pixels are summed over ranks before anything is divided: a mean of the ranks' mIoU is another number.
    result = counts.result(ctx.ranks.sum(counts.total))
    ctx.logger.table(f"{prefix}per_class", _class_rows(result, folder.classes))
    if ctx.is_main:
        with optional_figure(f"{prefix}predictions", ctx.logger.say):
            _draw(ctx, drawn, folder.classes, f"{prefix}predictions")
    metrics = {f"{prefix}{name}": value for name, value in _metrics(result).items()}
    rows = _protocol(ctx, metrics, len(val_set), folder)
    if ratios := ctx.section.multi_scale_ratios:
        multi_scale = [f"{prefix}multi_scale_{name}" for name in _metrics(result)]
        rows += _protocol(ctx, multi_scale, len(val_set), folder, num_sizes=len(ratios))
    params, counted_rows = counted_params(segmentor, prefix)
    ctx.logger.table(f"{prefix}{PROTOCOL}", rows + counted_rows)
    return metrics | params


def _protocol(
    ctx: StageContext, metrics: Iterable[str], num_images: int, folder: DenseFolder, num_sizes: int = 0
) -> list[dict[str, str]]:
    """How these numbers were measured; `num_sizes` of every picture, or its own size alone."""
    section: SegmentConfig = ctx.section
    size = f"{section.crop_size}x{section.crop_size}"
    slides = (section.inference or segmentation_head(section.head).inference) == "slide"
    window = f"sliding {size}, stride {section.stride}" if slides else "whole picture"
    mirrored = " and their mirror images" if section.multi_scale_flips else ""
    scales = f"{counted(num_sizes, 'scale')}{mirrored}" if num_sizes else "single scale"
    settings = {"inference": f"{window}, {scales}", "IoU": PIXEL_IOU}
    return protocol_rows(metrics, {**settings, "images": num_images, "classes": len(folder.classes)})


def _evaluate_multi_scale(
    ctx: StageContext, merged: MergedSizes, val_set: Any, folder: DenseFolder, prefix: str
) -> dict[str, float]:
    from vitpipe.stages.dense_training import predictions

    counts = PixelCounts(len(folder.classes))
    for sample in predictions(ctx, merged, val_set):
        counts.add(sample)
    result = counts.result(ctx.ranks.sum(counts.total))
    return {f"{prefix}multi_scale_{name}": value for name, value in _metrics(result).items()}


def _metrics(result: SegmentResult) -> dict[str, float]:
    return {"mIoU": result.mean_iou, "mAcc": result.mean_acc, "aAcc": result.all_acc}


def _class_rows(result: SegmentResult, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    columns = zip(classes, result.class_pixels, result.class_iou, result.class_acc, strict=True)
    return [
        {"class": name, "pixels": pixels, "IoU": _cell(iou), "Acc": _cell(acc)}
        for name, pixels, iou, acc in columns
    ]


def _cell(value: float) -> float | str:
    # An empty cell: a class that does not occur has no IoU, and NaN is not valid JSON.
    return "" if math.isnan(value) else value


def _draw(ctx: StageContext, samples: list[Any], classes: tuple[str, ...], name: str) -> None:
    """The first validation images: image, annotation, prediction, and the colours of the classes in them."""
    colours = class_colours(len(classes))
    tiles: list[Tile] = []
    drawn: list[Any] = []
    for sample in samples:
        image = np.asarray(rgb_file(sample.img_path))
        # Both maps have the image's original size: mmseg resizes predictions back.
        maps = [part.data.squeeze().cpu().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg)]
        tiles.append(Tile(fit(image, _TILE)))
        tiles += [Tile(fit(draw_labels(image, labels, colours), _TILE)) for labels in maps]
        drawn += maps
    path = ctx.folder / f"{name}.png"
    heads, legend = ("image", "annotated", "predicted"), legend_of(drawn, colours, classes)
    share = f" that rank 0 of {ctx.ranks.num_ranks} reads" if ctx.ranks.num_ranks > 1 else ""
    note = (
        f"The first {len(samples)} validation images{share}: image, annotated classes, predicted classes. "
        "The legend names every class that occurs in them; pixels without a class are dark and not counted."
    )
    write_grid(path, [Section("", tiles, heads, legend)], columns=3, note=note)
    ctx.logger.figure(name, path)
