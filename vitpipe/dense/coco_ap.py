"""COCO's twelve numbers and the average precision of each class, by faster-coco-eval.

Lin et al., Microsoft COCO, arXiv 1405.0312: average precision (AP) and recall (AR) over IoU thresholds 0.5 to
0.95. mmdet's own metric rounds to three digits and leaves out recalls; faster-coco-eval gives the reference
tool's numbers exactly and several times faster. Ratios in [0, 1]; areas in pixels.
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
# In the order of the reference tool's summary. Areas: below 32^2, below 96^2, above. AR1: one detection.
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
    """The twelve numbers by name, NaN where the set has no such object, and the classes in order."""

    numbers: dict[str, float]
    classes: tuple[ClassResult, ...]


def coco_results(sample: Any, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One image's predictions in COCO's result format, boxes as (x, y, w, h), masks run-length coded.

    Args:
        sample: mmdet's, with `pred_instances`: boxes (N, 4) as corners, scores, labels, masks (N, H, W).
        category_ids: COCO's id of each label.
    """
    from faster_coco_eval import mask as coding

    found = sample.pred_instances.cpu().numpy()
    masks = np.asfortranarray(found.masks.transpose(1, 2, 0).astype(np.uint8))
    codes = coding.encode(masks) if len(found.scores) else []
    return [
        {
            "image_id": sample.img_id,
            "category_id": category_ids[label],
            "bbox": [float(x) for x in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
            "score": float(score),
            "segmentation": {"size": list(code["size"]), "counts": _text(code["counts"])},
        }
        for box, score, label, code in zip(found.bboxes, found.scores, found.labels, codes, strict=True)
    ]


def coco_ap(annotations: Path, results: Sequence[Mapping[str, Any]], kind: Kind) -> CocoResult:
    """Judge predictions against a COCO annotation file.

    Args:
        results: as `coco_results` makes them, of all images.
        kind: boxes or masks.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    # Without its box a result's area is that of its mask, as the reference tool has it for masks.
    left_out = {"bbox"} if kind == "segm" else {"segmentation"}
    rows = [{key: value for key, value in row.items() if key not in left_out} for row in results]
    truth = COCO(str(annotations))
    found = truth.loadRes(rows) if rows else _nothing_found(truth)
    judge = COCOeval_faster(truth, found, kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return CocoResult(
        {name: _defined(value) for name, value in zip(NUMBERS, judge.stats[:12], strict=True)},
        tuple(_classes(truth, judge.eval["precision"])),
    )


def _nothing_found(truth: Any) -> Any:
    from faster_coco_eval import COCO

    found = COCO()
    found.dataset = {**{key: truth.dataset[key] for key in ("images", "categories")}, "annotations": []}
    found.createIndex()
    return found


def _classes(truth: Any, precision: NDArray[np.float64]) -> list[ClassResult]:
    """From precision (threshold, recall, class, area, detections) over all areas and 100 detections."""
    named = [(category["id"], category["name"]) for category in truth.loadCats(sorted(truth.getCatIds()))]
    table = precision[:, :, :, 0, -1]
    return [
        ClassResult(
            name,
            len(truth.getAnnIds(catIds=[number], iscrowd=False)),
            _mean(table[:, :, place]),
            _mean(table[0, :, place]),
        )
        for place, (number, name) in enumerate(named)
    ]


def _mean(values: NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan


def _defined(value: float) -> float:
    return float(value) if value > -1 else math.nan


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
