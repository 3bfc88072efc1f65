"""Table 13 of iTPN's supplement: Mask R-CNN at 640 x 640, counted as MMDetection's tool counts.

The FPN rows come out to the printed digit, so boxes, heads and counting are the paper's. What the pyramid rows
print more lies between the bounds below: few multiply-adds per weight, so at coarse strides (docs/itpn-costs.md).
"""

from __future__ import annotations

import pytest
import torch

from vitpipe.benchmarks import dense_cost as counting
from vitpipe.benchmarks.dense_cost import dense_cost
from vitpipe.config.read import load_recipe
from vitpipe.papers.published import rows

pytestmark = pytest.mark.dense

WIDE = (640, 640)


def recipe(name, *overrides):
    return load_recipe(name, "full", ("data.root=.", *overrides))


def fpn(network):
    """A plain vision transformer in MAE's place: four maps, an FPN, iTPN's heads; no class token."""
    return recipe(
        "itpn/pixel_base",
        f"model={{name: {network}, image_size: 224, pooling: mean, pyramid: null, decoder: null}}",
        "detect.head.neck=fpn",
        "stages=[prepare, detect, report]",
        "expect=[]",
    )


# Row -> recipe, parameters, module count, multiply-adds with attention products.
ROWS = {
    "MAE-B": (lambda: fpn("vit_base"), 114_880_752, 388_683_596_300, 435_504_000_000),
    "MAE-L": (lambda: fpn("vit_large"), 338_151_152, 756_243_071_500, 881_594_444_800),
    "iTPN-B": (lambda: recipe("itpn/pixel_base"), 101_459_824, 395_406_565_900, 457_891_097_600),
    "iTPN-L": (lambda: recipe("itpn/pixel_large"), 311_306_288, 738_603_033_100, 895_330_790_400),
}


def published(row):
    found = {r["metric"]: r["value"] for r in rows("itpn") if r["table"] == "13" and r["method"] == row}
    return found["params"], found["FLOPs"]


@pytest.fixture(scope="module")
def costs():
    return {row: dense_cost(build(), "detect", WIDE, 80) for row, (build, *_) in ROWS.items()}


@pytest.mark.parametrize("row", ROWS)
def test_counts_are_as_documented(row, costs):
    _, params, module_flops, macs = ROWS[row]
    assert costs[row].params == params
    assert costs[row].module_flops == pytest.approx(module_flops, abs=1e5)
    assert costs[row].macs == pytest.approx(macs, abs=1e5)


@pytest.mark.parametrize("row", ["MAE-B", "MAE-L"])
def test_fpn_rows_are_the_published_ones_to_the_printed_digit(row, costs):
    assert (round(costs[row].params / 1e6), round(costs[row].module_flops / 1e9)) == published(row)


@pytest.mark.parametrize("row", ["iTPN-B", "iTPN-L"])
def test_pyramid_rows_are_within_the_tolerance(row, costs):
    params, flops = published(row)
    assert costs[row].params / 1e6 == pytest.approx(params, rel=0.02)
    assert costs[row].module_flops / 1e9 == pytest.approx(flops, rel=0.005)


def missing(costs):
    """What both sizes lack, as (least, most) of parameters in 10^6 and of FLOPs in 10^9: prints are rounded."""
    bounds = []
    for number, printed in (("params", 0), ("module_flops", 1)):
        unit = 1e6 if number == "params" else 1e9
        gaps = [published(row)[printed] - getattr(costs[row], number) / unit for row in ("iTPN-B", "iTPN-L")]
        bounds.append((max(gaps) - 0.5, min(gaps) + 0.5))
    return bounds


def test_what_is_missing_has_few_multiply_adds_per_weight(costs):
    """A weight costs one multiply-add per position: 25,600 at stride 4, 6,400 at 8, 1,600 at 16, 400, 100."""
    (least_params, most_params), (least_flops, most_flops) = missing(costs)
    assert (round(least_params, 2), round(most_params, 2)) == (1.19, 2.04)
    assert (round(least_flops, 2), round(most_flops, 2)) == (1.09, 1.90)
    most_positions = 1000 * most_flops / least_params
    assert most_positions < 1600 < 6400
    # Two compositions that fit: an MLP block, or a 3 x 3 convolution, at each of strides 16, 32 and 64.
    positions = 1600 + 400 + 100
    for weights, parameters in ((2 * 256 * 1024, 526_080), (9 * 256 * 256, 590_080)):
        assert least_params < 3 * parameters / 1e6 < most_params
        assert least_flops < positions * weights / 1e9 < most_flops
    # A second linear layer in the box head has too few parameters.
    assert least_params > (1024 + 1) * 1024 / 1e6


@pytest.mark.parametrize("row", ["MAE-B", "iTPN-B"])
def test_mmcvs_own_counter_gives_the_same(row, costs, monkeypatch):
    from mmcv.cnn.utils.flops_counter import add_flops_counting_methods

    built = []
    monkeypatch.setattr(counting, "measure_cost", lambda build, size: built.append(build))
    dense_cost(ROWS[row][0](), "detect", WIDE, 80)
    with torch.device("meta"):
        counted = add_flops_counting_methods(built[0]()).eval()
        counted.start_flops_count()
        counted(torch.empty(1, 3, *WIDE))
        flops, params = counted.compute_average_flops_cost()
    # Parameters outside of counted modules (position tables) are not in MMCV's sum.
    assert flops == costs[row].module_flops
    assert params <= costs[row].params
