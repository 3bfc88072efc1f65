"""Detection and instance segmentation on COCO with a head on the pre-trained network.

data + weights > detector > train > COCO's twelve metrics for boxes and masks > tables, figure, weights
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitpipe.config.dense_sections import DetectConfig
from vitpipe.contracts.protocol import COCO_AP, PROTOCOL, protocol_rows
from vitpipe.data.image_grid import (
    DrawnObject,
    Section,
    Tile,
    class_colours,
    draw_objects,
    optional_figure,
    write_grid,
)
from vitpipe.datasets.dense_folder import DenseFolder, open_dense
from vitpipe.datasets.layouts.coco_outlines import mask_of
from vitpipe.dense.coco_ap import NUMBERS, CocoResult, coco_ap, coco_results
from vitpipe.dense.coco_dataset import (
    coco_dataset,
    eval_pipeline,
    padding_groups,
    train_pipeline,
)
from vitpipe.dense.detector import build_detector, detector_config
from vitpipe.dense.mm_import import open_detection
from vitpipe.stages.context import StageContext
from vitpipe.stages.detect.config import STAGE
from vitpipe.stages.used_datasets import record_datasets

_NUM_DRAWN, _TILE = 4, 256
# Below it a Mask R-CNN lists up to 100 boxes per image (its own threshold is 0.05), which hide the image.
_MIN_DRAWN_SCORE = 0.3


def run(ctx: StageContext) -> dict[str, float]:
    """Train and evaluate the detector.

    Writes `weights.safetensors` (backbone, pyramid and heads), `mm_config.json`, the tables
    `weights_account`, `box_ap`, `mask_ap` and `per_class`, and the figure `predictions`.

    Returns:
        `box_AP`, `box_AP50`, ... and the same for `mask_`, ratios in [0, 1]. A metric that is undefined,
        because the set has no object of that size, is left out.

    Raises:
        DatasetError: COCO is missing or damaged.
        CheckpointError: the starting weights do not fit.
        RunError: mmdet is not installed.
    """
    # First: the modules imported below import mmengine, whose absence should be reported as a RunError.
    open_detection(str(ctx.ranks.device))
    from vitpipe.stages.dense_training import fit_dense, measure_dense, plan_dense, save_config
    from vitpipe.stages.training import seed_model, start_from_weights

    section: DetectConfig = ctx.section
    folder = open_dense(ctx.inputs["data"].path, section.dataset, ctx.state / "data", STAGE.reads)
    record_datasets(ctx, section.dataset)
    pipelines = {"train": train_pipeline(section), "val": eval_pipeline(section)}
    train_set, val_set = (coco_dataset(folder, split, steps) for split, steps in pipelines.items())
    plan, norm = plan_dense(ctx, train_set)
    config = detector_config(section, ctx.recipe.model, num_classes=len(folder.classes), norm=norm)
    save_config(ctx, network=config, pipelines=pipelines)
    # Directly before the network is built: `detector_config` has built one, too, to read its widths.
    seed_model(ctx)
    detector = build_detector(config, section)
    detector.init_weights()
    start = start_from_weights(ctx, detector.backbone.net)
    detector.to(ctx.ranks.device)
    groups = padding_groups(section, train_set)
    state = fit_dense(ctx, detector, plan, train_set, groups, norm=norm, start=start)

    def measured(prefix: str) -> dict[str, float]:
        return _evaluate(ctx, state.method.model, val_set, folder, prefix)

    # With the class names: the file alone says what its class numbers mean.
    return measure_dense(ctx, state, measured, classes=json.dumps(folder.classes))


def _evaluate(
    ctx: StageContext, detector: Any, val_set: Any, folder: DenseFolder, prefix: str
) -> dict[str, float]:
    """Predict, compute metrics, write tables and the figure; only rank 0 returns metrics."""
    from vitpipe.stages.dense_training import gathered, predictions

    results: list[dict[str, Any]] = []
    drawn: list[Any] = []
    for sample in predictions(ctx, detector, val_set):
        results += coco_results(sample, val_set.cat_ids)
        if len(drawn) < _NUM_DRAWN:
            drawn.append(sample)
    results = gathered(ctx, results)
    if not ctx.is_main:
        return {}
    # Evaluated against the annotation file itself, with its crowds and areas, not against mmdet's samples.
    annotations = Path(val_set.ann_file)
    boxes, masks = coco_ap(annotations, results, "bbox"), coco_ap(annotations, results, "segm")
    for kind, result in (("box", boxes), ("mask", masks)):
        rows = [{"metric": name, "value": _cell(result.numbers[name])} for name in NUMBERS]
        ctx.logger.table(f"{prefix}{kind}_ap", rows)
    ctx.logger.table(f"{prefix}per_class", _class_rows(boxes, masks))
    with optional_figure(f"{prefix}predictions", ctx.logger.say):
        _draw(ctx, val_set, drawn, len(folder.classes), f"{prefix}predictions")
    metrics = {
        f"{prefix}{kind}_{name}": value
        for kind, result in (("box", boxes), ("mask", masks))
        for name, value in result.numbers.items()
        if not math.isnan(value)
    }
    long_side, short_side = ctx.section.test_size
    ctx.logger.table(
        f"{prefix}{PROTOCOL}",
        protocol_rows(
            metrics,
            {
                "test size": f"{long_side}x{short_side}",
                "flips": "none",
                "AP": COCO_AP,
                "images": len(val_set),
                "classes": len(folder.classes),
            },
        ),
    )
    return metrics


def _class_rows(boxes: CocoResult, masks: CocoResult) -> list[dict[str, Any]]:
    return [
        {
            "class": box.name,
            "objects": box.num_objects,
            "box_AP": _cell(box.ap),
            "box_AP50": _cell(box.ap50),
            "mask_AP": _cell(mask.ap),
            "mask_AP50": _cell(mask.ap50),
        }
        for box, mask in zip(boxes.classes, masks.classes, strict=True)
    ]


def _cell(value: float) -> float | str:
    # An empty cell, as in the published tables; NaN is not valid JSON.
    return "" if math.isnan(value) else value


def _draw(ctx: StageContext, val_set: Any, samples: list[Any], num_classes: int, name: str) -> None:
    """The first validation images: ground truth beside the predictions with a score of at least 0.3."""
    colours = class_colours(num_classes)
    names = val_set.metainfo["classes"]
    infos = {info["img_id"]: info for info in map(val_set.get_data_info, range(len(val_set)))}
    tiles: list[Tile] = []
    for sample in samples:
        with Image.open(sample.img_path) as file:
            image = np.asarray(file.convert("RGB"))
        truth = _true_objects(infos[sample.img_id], names)
        predicted = _predicted_objects(sample.pred_instances.cpu().numpy(), names)
        # "at least" in words: Pillow's built-in font has no sign for it.
        captions = (
            f"ground truth: {_count(truth)}",
            f"predicted, score at least {_MIN_DRAWN_SCORE:g}: {_count(predicted)}",
        )
        for objects, caption in zip((truth, predicted), captions, strict=True):
            tiles.append(Tile(draw_objects(image, objects, colours, _TILE), caption))
    path = ctx.folder / f"{name}.png"
    write_grid(path, [Section("", tiles)], columns=2)
    ctx.logger.figure(name, path)


def _count(objects: list[DrawnObject]) -> str:
    return f"{len(objects)} object{'s' if len(objects) != 1 else ''}"


def _true_objects(info: dict[str, Any], names: tuple[str, ...]) -> list[DrawnObject]:
    objects = []
    for instance in info["instances"]:
        label = instance["bbox_label"]
        text = "crowd of " + names[label] if instance["ignore_flag"] else names[label]
        mask = mask_of(instance["mask"], info["height"], info["width"])
        objects.append(DrawnObject(label, instance["bbox"], mask, text))
    return objects


def _predicted_objects(predicted: Any, names: tuple[str, ...]) -> list[DrawnObject]:
    return [
        DrawnObject(int(label), box.tolist(), mask.astype(bool), f"{names[label]} {score:.2f}")
        for label, box, mask, score in zip(
            predicted.labels, predicted.bboxes, predicted.masks, predicted.scores, strict=True
        )
        if score >= _MIN_DRAWN_SCORE
    ]
