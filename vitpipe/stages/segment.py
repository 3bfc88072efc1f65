"""Semantic segmentation on ADE20K: UPerNet or Mask2Former on the pre-trained network.

data + weights > segmentor > train > mIoU, aAcc, mAcc > table, picture, weights
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from PIL import Image

from vitpipe.datasets.dense_folder import DenseFolder, open_dense
from vitpipe.dense.miou import PixelCounts, SegmentResult
from vitpipe.dense.mm_import import open_segmentation
from vitpipe.dense.multi_scale import MergedSizes
from vitpipe.dense.pictures import class_colours, draw_labels, write_sheet
from vitpipe.dense.plan import segment_plan
from vitpipe.dense.segmentor import (
    ade_dataset,
    build_segmentor,
    eval_pipeline,
    multi_scale_pipeline,
    segmentor_config,
    train_pipeline,
)
from vitpipe.stages.context import StageContext
from vitpipe.stages.used_datasets import record_datasets
from vitpipe.train.ranks import Ranks, joined

_NUM_DRAWN = 4


def run(ctx: StageContext) -> dict[str, float]:
    """Train and judge the segmentor.

    Writes `weights.safetensors` (backbone, pyramid and heads), `mm_config.json`, the tables `weights_account`
    and `per_class`, and the figure `predictions`.

    Returns:
        `mIoU`, `mAcc` (means over classes) and `aAcc` (over pixels), ratios in [0, 1]; with
        `multi_scale_ratios` also `multi_scale_mIoU` and so on, over several sizes and their mirror images.

    Raises:
        DatasetError: ADE20K is not there or is damaged.
        CheckpointError: the starting weights do not fit.
        RunError: mmseg is not installed.
    """
    section = ctx.recipe.segment
    assert section is not None
    open_segmentation(section.head)
    from vitpipe.stages.dense_training import fit_dense, save_config
    from vitpipe.stages.training import save_result, seed_model, start_from_weights

    with joined(ctx.rank, ctx.num_ranks, ctx.device) as ranks:
        folder = open_dense(ctx.inputs["data"].path, "ade20k", ctx.state / "data")
        record_datasets(ctx, "ade20k")
        pipelines = {"train": train_pipeline(section), "val": eval_pipeline(section)}
        if section.multi_scale_ratios:
            pipelines["val_multi_scale"] = multi_scale_pipeline(section)
        sets = {
            name: ade_dataset(folder, "train" if name == "train" else "val", steps)
            for name, steps in pipelines.items()
        }
        plan = segment_plan(section, num_ranks=ranks.num_ranks, accelerator=ranks.accelerator)
        config = segmentor_config(section, ctx.recipe.model, num_classes=len(folder.classes), norm=plan.norm)
        save_config(ctx, network=config, pipelines=pipelines)
        seed_model(ctx)
        segmentor = build_segmentor(config)
        segmentor.init_weights()
        start = start_from_weights(ctx, segmentor.backbone.net)
        segmentor.to(ranks.device)
        fit_dense(ctx, segmentor, plan, sets["train"], ranks, start=start)
        save_result(ctx, segmentor, classes=json.dumps(folder.classes))
        metrics = _judge(ctx, segmentor, sets["val"], folder, ranks)
        if section.multi_scale_ratios:
            merged = MergedSizes(segmentor, softmax=section.head == "upernet")
            metrics |= _judge_multi_scale(ctx, merged, sets["val_multi_scale"], folder, ranks)
        return metrics


def _judge(
    ctx: StageContext, segmentor: Any, val_set: Any, folder: DenseFolder, ranks: Ranks
) -> dict[str, float]:
    """Predict, count, write the table and the picture; every rank has the numbers."""
    from vitpipe.stages.dense_training import predictions

    counts = PixelCounts(len(folder.classes))
    drawn: list[Any] = []
    for sample in predictions(ctx, segmentor, val_set, ranks):
        counts.add(sample)
        if len(drawn) < _NUM_DRAWN:
            drawn.append(sample)
    result = counts.result(ranks.sum(counts.total))
    ctx.logger.table("per_class", _class_rows(result, folder.classes))
    if ctx.is_main:
        _draw(ctx, drawn, len(folder.classes))
    return _metrics(result)


def _judge_multi_scale(
    ctx: StageContext, merged: MergedSizes, val_set: Any, folder: DenseFolder, ranks: Ranks
) -> dict[str, float]:
    from vitpipe.stages.dense_training import predictions

    counts = PixelCounts(len(folder.classes))
    for sample in predictions(ctx, merged, val_set, ranks):
        counts.add(sample)
    result = counts.result(ranks.sum(counts.total))
    return {f"multi_scale_{name}": value for name, value in _metrics(result).items()}


def _metrics(result: SegmentResult) -> dict[str, float]:
    return {"mIoU": result.mean_iou, "mAcc": result.mean_acc, "aAcc": result.all_acc}


def _class_rows(result: SegmentResult, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    columns = zip(classes, result.class_pixels, result.class_iou, result.class_acc, strict=True)
    return [
        {"class": name, "pixels": pixels, "IoU": _cell(iou), "Acc": _cell(acc)}
        for name, pixels, iou, acc in columns
    ]


def _cell(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _draw(ctx: StageContext, samples: list[Any], num_classes: int) -> None:
    """The first validation images: picture, truth, prediction."""
    colours = class_colours(num_classes)
    rows = []
    for sample in samples:
        with Image.open(sample.img_path) as file:
            image = np.asarray(file.convert("RGB"))
        maps = (part.data.squeeze().cpu().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg))
        rows.append((image, *(draw_labels(image, labels, colours) for labels in maps)))
    path = ctx.folder / "predictions.png"
    write_sheet(rows, ("image", "truth (dark: ignored)", "predicted"), path)
    ctx.logger.figure("predictions", path)
