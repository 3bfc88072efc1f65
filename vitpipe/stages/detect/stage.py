"""Detection and instance segmentation on COCO with a head on the pre-trained network.

data + weights > detector > train > COCO's twelve metrics for boxes and masks > tables, figure, weights
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vitpipe.config.dense_sections import DetectConfig
from vitpipe.contracts.protocol import COCO_AP, PROTOCOL, protocol_rows
from vitpipe.contracts.units import counted
from vitpipe.data.image_grid import (
    DrawnObject,
    Section,
    Tile,
    class_colours,
    draw_objects,
    optional_figure,
    write_grid,
)
from vitpipe.data.image_pixels import rgb_file
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

_NUM_DRAWN, _TILE = 4, 320
# A Mask R-CNN lists up to 100 boxes per image, which would hide it; a lower limit of the score would show
# nothing of a detector that has found its objects with low scores, which is enough for AP.
_NUM_BOXES = 5


def run(ctx: StageContext) -> dict[str, float]:
    """Train and evaluate the detector.

    Writes `weights.safetensors` (backbone, pyramid and heads), `mm_config.json`, the tables
    `weights_account`, `box_ap`, `mask_ap` and `per_class`, and the figure `predictions`.

    Returns:
        `box_AP`, `box_AP50`, ... and the same for `mask_`, ratios in [0, 1]. A metric that is undefined,
        because the set has no object of that size, is left out. `params` counts those of the whole detector.

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
    from vitpipe.stages.dense_training import counted_params, predictions

    results: list[dict[str, Any]] = []
    for sample in predictions(ctx, detector, val_set):
        results += coco_results(sample, val_set.cat_ids)
    results = ctx.ranks.gather_rows(results)
    if not ctx.is_main:
        return {}
    # Evaluated against the annotation file itself, with its crowds and areas, not against mmdet's samples.
    annotations = Path(val_set.ann_file)
    boxes, masks = coco_ap(annotations, results, "bbox"), coco_ap(annotations, results, "segm")
    for kind, result in (("box", boxes), ("mask", masks)):
        numbers = [{"metric": name, "value": _cell(result.numbers[name])} for name in NUMBERS]
        ctx.logger.table(f"{prefix}{kind}_ap", numbers)
    ctx.logger.table(f"{prefix}per_class", _class_rows(boxes, masks))
    with optional_figure(f"{prefix}predictions", ctx.logger.say):
        _draw(ctx, val_set, results, len(folder.classes), f"{prefix}predictions")
    metrics = {
        f"{prefix}{kind}_{name}": value
        for kind, result in (("box", boxes), ("mask", masks))
        for name, value in result.numbers.items()
        if not math.isnan(value)
    }
    long_side, short_side = ctx.section.test_size
    rows = protocol_rows(
        metrics,
        {
            "test size": f"{long_side}x{short_side}",
            "flips": "none",
            "AP": COCO_AP,
            "images": len(val_set),
            "classes": len(folder.classes),
        },
    )
    params, counted = counted_params(detector, prefix)
    ctx.logger.table(f"{prefix}{PROTOCOL}", rows + counted)
    return metrics | params


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


def _draw(
    ctx: StageContext, val_set: Any, results: list[dict[str, Any]], num_classes: int, name: str
) -> None:
    """Annotated objects beside the boxes with the highest scores, of the first images that hold objects.

    The images are chosen by their annotations alone, and the boxes whatever their score: the picture shows
    what the detector finds, also where that is little.
    """
    colours = class_colours(num_classes)
    names = val_set.metainfo["classes"]
    tiles: list[Tile] = []
    for info in _first_with_objects(val_set):
        image = np.asarray(rgb_file(info["img_path"]))
        own = [found for found in results if found["image_id"] == info["img_id"]]
        best = sorted(own, key=lambda found: -found["score"])[:_NUM_BOXES]
        truth = _true_objects(info, names)
        predicted = [_predicted_object(found, val_set.cat_ids, names) for found in best]
        captions = (counted(len(truth), "object"), _scores(best))
        for objects, caption in zip((truth, predicted), captions, strict=True):
            tiles.append(Tile(draw_objects(image, objects, colours, _TILE), caption))
    path = ctx.folder / f"{name}.png"
    heads = ("annotated", f"predicted: the {_NUM_BOXES} highest scores")
    num_drawn = counted(len(tiles) // 2, "validation image")
    note = (
        f"The first {num_drawn} with objects, in the order of the annotation file. Left the annotated "
        f"objects, right the {_NUM_BOXES} predicted boxes with the highest scores, each with class and "
        "score, however low the score is."
    )
    write_grid(path, [Section("", tiles, heads)], columns=2, note=note)
    ctx.logger.figure(name, path)


def _first_with_objects(val_set: Any) -> list[dict[str, Any]]:
    """The first images that hold an object; a crowd is none, it is not counted by the metric."""
    infos = map(val_set.get_data_info, range(len(val_set)))
    holding = (info for info in infos if not all(thing["ignore_flag"] for thing in info["instances"]))
    return list(islice(holding, _NUM_DRAWN))


def _scores(best: list[dict[str, Any]]) -> str:
    if not best:
        return "no box"
    high, low = best[0]["score"], best[-1]["score"]
    if len(best) == 1:
        return f"1 box, score {high:.2f}"
    return f"{len(best)} boxes, scores {high:.2f} to {low:.2f}"


def _true_objects(info: dict[str, Any], names: tuple[str, ...]) -> list[DrawnObject]:
    objects = []
    for instance in info["instances"]:
        label = instance["bbox_label"]
        text = "crowd of " + names[label] if instance["ignore_flag"] else names[label]
        mask = mask_of(instance["mask"], info["height"], info["width"])
        objects.append(DrawnObject(label, instance["bbox"], mask, text))
    return objects


def _predicted_object(
    found: dict[str, Any], category_ids: Sequence[int], names: tuple[str, ...]
) -> DrawnObject:
    """One entry of COCO's result format, whose box is (x, y, width, height)."""
    label = list(category_ids).index(found["category_id"])
    x, y, width, height = found["bbox"]
    mask = mask_of(found["segmentation"], *found["segmentation"]["size"])
    return DrawnObject(label, (x, y, x + width, y + height), mask, f"{names[label]} {found['score']:.2f}")
