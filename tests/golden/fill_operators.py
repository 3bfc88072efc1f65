"""Fill operators.json: what mmcv's compiled NMS and RoIAlign give, and a run of them by torchvision must give.

    python tests/golden/fill_operators.py

It needs an environment whose mmcv was compiled with its operators (`MMCV_WITH_OPS=1`, torch present while it is built).
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from mmcv import _ext
from mmcv.ops import RoIAlign, nms

THRESHOLDS = (0.3, 0.5, 0.7)
SAMPLING = ((0, True), (0, False), (2, True), (2, False))


def boxes_and_scores():
    """200 overlapping boxes on 120 x 120 pixels and their scores; formulas, so that any version can draw them."""
    n = torch.arange(200, dtype=torch.float64)
    corner = torch.stack([(n * 37.3) % 80, (n * 53.9) % 80], 1)
    size = torch.stack([(n * 11.7) % 40 + 1, (n * 17.1) % 40 + 1], 1)
    return torch.cat([corner, corner + size], 1).float(), ((n * 0.61803398875) % 1).float()


def maps_and_regions():
    """Features (2, 2, 8, 9), five regions at stride 4 (one reaches outside, one is empty), weights of the sum."""
    features = torch.sin(torch.arange(288, dtype=torch.float64) * 0.37).reshape(2, 2, 8, 9).float()
    regions = [
        [0, 3, 2, 21, 17],
        [1, 0, 0, 35, 31],
        [1, 20.5, 11.25, 30, 29],
        [0, -9, -4, 12, 40],
        [0, 8, 8, 8, 8],
    ]
    weights = torch.cos(torch.arange(60, dtype=torch.float64) * 0.53).reshape(5, 2, 2, 3).float()
    return features, torch.tensor(regions, dtype=torch.float32), weights


def main():
    """Write operators.json beside this file."""
    assert _ext.__file__.endswith(".so"), "mmcv's operators are not compiled here"
    boxes, scores = boxes_and_scores()
    kept = [nms(boxes, scores, threshold)[1].tolist() for threshold in THRESHOLDS]
    aligned = []
    for ratio, half_pixel in SAMPLING:
        features, regions, weights = maps_and_regions()
        features.requires_grad_()
        output = RoIAlign((2, 3), 0.25, ratio, aligned=half_pixel)(features, regions)
        (output * weights).sum().backward()
        values = [[round(v, 9) for v in t.flatten().tolist()] for t in (output.detach(), features.grad)]
        aligned.append({"output": values[0], "gradient": values[1]})
    content = {
        "source": f"onedl-mmcv {version('onedl-mmcv')} compiled for torch {torch.__version__}, CPU, float32",
        "nms": kept,
        "roi_align": aligned,
    }
    Path(__file__).with_name("operators.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
