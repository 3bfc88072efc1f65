"""Semantic segmentation on ADE20K: UPerNet on the pre-trained pyramid.

data + weights > segmentor > train > mIoU, aAcc, mAcc > table, picture, weights
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from PIL import Image

from vitpipe.data.dense import DenseFolder, open_dense
from vitpipe.dense.library import open_segmentation
from vitpipe.dense.miou import PixelCounts, SegmentResult
from vitpipe.dense.pictures import class_colours, draw_labels, write_sheet
from vitpipe.dense.plan import segment_plan
from vitpipe.dense.segment import (
    ade_dataset,
    build_segmentor,
    eval_pipeline,
    segmentor_config,
    train_pipeline,
)
from vitpipe.stages.context import StageContext
from vitpipe.train.ranks import Ranks, joined

_NUM_DRAWN = 4


def run(ctx: StageContext) -> dict[str, float]:
    """Train and judge the segmentor.

    Writes `weights.safetensors` (backbone, pyramid and heads), `mm_config.json`, the tables `weights_account`
    and `per_class`, and the figure `predictions`.

    Returns:
        `mIoU`, `mAcc` (means over classes) and `aAcc` (over pixels), ratios in [0, 1].

    Raises:
        DatasetError: ADE20K is not there or is damaged.
        CheckpointError: the starting weights do not fit.
        RunError: mmseg is not installed.
    """
    open_segmentation()
    from vitpipe.stages.dense_training import fit_dense, save_config
    from vitpipe.stages.training import save_result, seed_model, start_from_weights

    section = ctx.recipe.segment
    assert section is not None
    with joined(ctx.rank, ctx.num_ranks, ctx.device) as ranks:
        folder = open_dense(ctx.inputs["data"].path, "ade20k", ctx.state / "data")
        pipelines = {"train": train_pipeline(section), "val": eval_pipeline(section)}
        train_set, val_set = (ade_dataset(folder, split, steps) for split, steps in pipelines.items())
        plan = segment_plan(section, num_ranks=ranks.num_ranks, accelerator=ranks.accelerator)
        config = segmentor_config(section, ctx.recipe.model, num_classes=len(folder.classes), norm=plan.norm)
        save_config(ctx, network=config, pipelines=pipelines)
        seed_model(ctx)
        segmentor = build_segmentor(config)
        segmentor.init_weights()
        start_from_weights(ctx, segmentor.backbone.net)
        segmentor.to(ranks.device)
        fit_dense(ctx, segmentor, plan, train_set, folder, ranks)
        save_result(ctx, segmentor, classes=json.dumps(folder.classes))
        return _judge(ctx, segmentor, val_set, folder, ranks)


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
