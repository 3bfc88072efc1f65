"""COCO's twelve metrics and the average precision of each class, computed by faster-coco-eval.

Lin et al., Microsoft COCO, arXiv 1405.0312: average precision (AP) and recall (AR) over IoU thresholds 0.5 to
0.95. Ratios in [0, 1]; areas in pixels.

mmdet's own metric rounds to three digits and leaves out recalls; faster-coco-eval gives pycocotools' numbers
exactly and several times faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["bbox", "segm"]
# In the order of pycocotools' `summarize`. Areas: below 32^2, below 96^2, above. AR1: one detection an image.
NUMBERS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


@dataclass(frozen=True)
class ClassResult:
    """AP of one class, over all thresholds and at IoU 0.5; NaN for a class without objects."""

    name: str
    num_objects: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class CocoResult:
    """The twelve metrics by name, NaN where the set has no such object, and the classes by category id."""

    numbers: dict[str, float]
    classes: tuple[ClassResult, ...]


def coco_results(sample: Any, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Convert one image's predictions to COCO's result format: boxes (x, y, w, h), masks run-length encoded.

    Args:
        sample: mmdet's `DetDataSample` with `pred_instances`: boxes (N, 4) as corners, scores (N,), labels
            (N,), masks (N, H, W).
        category_ids: COCO's id of each label.
    """
    found = sample.pred_instances.cpu().numpy()
    return [
        {
            "image_id": sample.img_id,
            "category_id": category_ids[label],
            "bbox": [float(x) for x in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
            "score": float(score),
            "segmentation": {"size": list(mask.shape), "counts": code},
        }
        for box, score, label, mask, code in zip(
            found.bboxes, found.scores, found.labels, found.masks, encoded_masks(found.masks), strict=True
        )
    ]


def encoded_masks(masks: NDArray[np.bool_]) -> list[str]:
    """Masks (N, H, W) -> COCO's run-length codes as texts."""
    from faster_coco_eval import mask as coding

    if not len(masks):
        return []
    # The encoder reads (H, W, N) in column-major order, as pycocotools' does.
    columns = np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))
    return [_text(code["counts"]) for code in coding.encode(columns)]


def coco_ap(annotations: Path, results: Sequence[Mapping[str, Any]], kind: Kind) -> CocoResult:
    """Evaluate predictions against a COCO annotation file.

    Args:
        results: from `coco_results`, of all images.
        kind: evaluate boxes or masks.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    # `loadRes` takes the area of a result from its box if it has one. Size classes of masks go by the area of
    # the mask, as in pycocotools' own mask evaluation.
    left_out = {"bbox"} if kind == "segm" else {"segmentation"}
    rows = [{key: value for key, value in row.items() if key not in left_out} for row in results]
    truth = COCO(str(annotations))
    found = truth.loadRes(rows)
    judge = COCOeval_faster(truth, found, kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    # The first twelve are pycocotools'; faster-coco-eval computes more (AR50, AR75).
    return CocoResult(
        {name: _defined(value) for name, value in zip(NUMBERS, judge.stats[:12], strict=True)},
        tuple(_classes(truth, judge.eval["precision"])),
    )


def _classes(truth: Any, precision: NDArray[np.float64]) -> list[ClassResult]:
    """From precision (IoU threshold, recall, class, area, max detections): all areas, 100 detections."""
    named = [(category["id"], category["name"]) for category in truth.loadCats(sorted(truth.getCatIds()))]
    # The evaluator sorts classes by category id, as `named` is sorted.
    table = precision[:, :, :, 0, -1]
    return [
        ClassResult(
            name,
            # Crowds are ignored regions, not objects to be found.
            len(truth.getAnnIds(catIds=[number], iscrowd=False)),
            _mean(table[:, :, place]),
            _mean(table[0, :, place]),
        )
        for place, (number, name) in enumerate(named)
    ]


def _mean(values: NDArray[np.float64]) -> float:
    # COCO marks undefined entries by -1: a mean over them would be below zero.
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan


def _defined(value: float) -> float:
    return float(value) if value > -1 else math.nan


def _text(counts: bytes | str) -> str:
    # The encoder returns bytes, which JSON cannot hold.
    return counts.decode() if isinstance(counts, bytes) else counts
