"""The twelve metrics equal pycocotools', for boxes and masks, with crowds, gaps in ids and empty images."""

from __future__ import annotations

import contextlib
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitpipe.dense.coco_ap import NUMBERS, coco_ap, coco_results

pytestmark = pytest.mark.dense


def noisy_results(annotations, seed, keep=0.8):
    """Detections near the true objects, some missed, some of the wrong class, some made up."""
    from pycocotools import mask as coding
    from pycocotools.coco import COCO

    rng = np.random.default_rng(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    categories = truth.getCatIds()
    results = []
    for annotation in truth.loadAnns(truth.getAnnIds()):
        if rng.random() > keep:
            continue
        mask = np.roll(truth.annToMask(annotation), rng.integers(-2, 3, 2), axis=(0, 1))
        code = coding.encode(np.asfortranarray(mask))
        x, y, w, h = coding.toBbox(code) + rng.normal(0, 1, 4)
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": int(
                    annotation["category_id"] if rng.random() < 0.8 else rng.choice(categories)
                ),
                "bbox": [float(x), float(y), max(1.0, float(w)), max(1.0, float(h))],
                "score": float(rng.random()),
                "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
            }
        )
    return results


def reference(annotations, results, kind):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    dropped = "bbox" if kind == "segm" else "segmentation"
    rows = [{k: v for k, v in row.items() if k != dropped} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        judge = COCOeval(truth, truth.loadRes(rows), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_identical_to_pycocotools(raw_sets, kind, seed):
    annotations = raw_sets / "coco" / "annotations" / "instances_train2017.json"
    results = noisy_results(annotations, seed)
    ours, judge = coco_ap(annotations, results, kind), reference(annotations, results, kind)
    assert 0.05 < ours.numbers["AP"] < 0.95
    for name, expected in zip(NUMBERS, judge.stats, strict=True):
        if expected == -1:
            assert math.isnan(ours.numbers[name])
        else:
            assert ours.numbers[name] == pytest.approx(expected, abs=1e-12), name
    precision = judge.eval["precision"][:, :, :, 0, -1]
    for place, one in enumerate(ours.classes):
        known = precision[:, :, place][precision[:, :, place] > -1]
        assert one.ap == pytest.approx(known.mean(), abs=1e-12) if known.size else math.isnan(one.ap)


def test_nothing_found_is_zero(raw_sets):
    annotations = raw_sets / "coco" / "annotations" / "instances_val2017.json"
    result = coco_ap(annotations, [], "bbox")
    assert result.numbers["AP"] == result.numbers["AR100"] == 0.0
    categories = json.loads(annotations.read_text())["categories"]
    assert [one.name for one in result.classes] == [category["name"] for category in categories]


def test_results_carry_categories_and_masks():
    from pycocotools import mask as coding

    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1:4, 2:5] = masks[1, :, 7] = True
    found = SimpleNamespace(
        bboxes=torch.tensor([[2.0, 1.0, 5.0, 4.0], [7.0, 0.0, 8.0, 6.0]]),
        scores=torch.tensor([0.5, 0.25]),
        labels=torch.tensor([1, 0]),
        masks=masks,
    )
    found.cpu = lambda: SimpleNamespace(
        numpy=lambda: SimpleNamespace(**{k: v.numpy() for k, v in vars(found).items() if k != "cpu"})
    )
    rows = coco_results(SimpleNamespace(img_id=9, pred_instances=found), category_ids=(4, 11))
    assert [row["category_id"] for row in rows] == [11, 4]
    assert rows[0]["bbox"] == [2.0, 1.0, 3.0, 3.0]
    assert [coding.area(row["segmentation"]) for row in rows] == [9, 6]
