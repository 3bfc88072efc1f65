"""torchvision's operators in the place of mmcv's: the compiled ones' numbers, and a paragraph for the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.errors import RunError
from vitpipe.dense import operators

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))

pytestmark = pytest.mark.dense


@pytest.fixture(scope="module")
def ops():
    """`mmcv.ops` over our operators."""
    operators.register()
    import mmcv.ops

    return mmcv.ops


@pytest.fixture(scope="module")
def inputs(ops):
    """The module that filled the golden file; its inputs are formulas."""
    import fill_operators

    return fill_operators


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "operators.json").read_text())


def test_nms_keeps_what_the_compiled_one_keeps(ops, inputs, golden):
    boxes, scores = inputs.boxes_and_scores()
    kept = [ops.nms(boxes, scores, threshold)[1].tolist() for threshold in inputs.THRESHOLDS]
    assert kept == golden["nms"]
    assert 5 < len(kept[0]) < len(kept[1]) < len(kept[2]) < 200


@pytest.mark.parametrize("case", range(4))
def test_roi_align_and_its_gradient_are_the_compiled_ones(ops, inputs, golden, case):
    features, regions, weights = inputs.maps_and_regions()
    features.requires_grad_()
    ratio, half_pixel = inputs.SAMPLING[case]
    output = ops.RoIAlign((2, 3), 0.25, ratio, aligned=half_pixel)(features, regions)
    (output * weights).sum().backward()
    expected = golden["roi_align"][case]
    # The file has nine decimals; another processor may add in another order.
    torch.testing.assert_close(output.flatten(), torch.tensor(expected["output"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        features.grad.flatten(), torch.tensor(expected["gradient"]), rtol=1e-6, atol=1e-6
    )


def test_the_layout_of_the_features_does_not_matter(ops, inputs):
    # mmcv's compiled operator reads a map whose channels lie last as if they did not.
    features, regions, weights = inputs.maps_and_regions()
    strided = torch.zeros(5, 10)
    strided[:, ::2] = regions
    found = []
    for maps, rois in (
        (features, regions),
        (features.to(memory_format=torch.channels_last), strided[:, ::2]),
    ):
        maps.requires_grad_()
        output = ops.RoIAlign((2, 3), 0.25)(maps, rois)
        (output * weights).sum().backward()
        found.append((output, maps.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20), st.integers(1, 20)), max_size=25
    ),
    st.sampled_from([0.25, 0.5, 0.75]),
)
def test_nms_is_the_greedy_one(corners, threshold):
    operators.register()
    from mmcv.ops import nms

    boxes = [(x, y, x + width, y + height) for x, y, width, height in corners]
    kept: list[int] = []
    for place, box in enumerate(boxes):  # best first
        if all(overlap(box, boxes[better]) <= threshold for better in kept):
            kept.append(place)
    scores = torch.linspace(1, 0.1, len(boxes)) if boxes else torch.zeros(0)
    found = nms(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), scores, threshold)[1]
    assert found.tolist() == kept


def test_of_equal_scores_the_first_stays(ops):
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10]]).repeat(100, 1)
    assert ops.nms(boxes, torch.full((300,), 0.5), 0.5)[1].tolist() == [0, 2]
    assert ops.nms(boxes.flip(0), torch.full((300,), 0.5), 0.5)[1].tolist() == [0, 1]


@pytest.mark.parametrize("tenths", range(1, 10))
def test_an_overlap_of_exactly_the_threshold_stays(ops, tenths):
    """As in mmcv and on a GPU; an overlap of 3 / 10 is above 0.3 as a double and equal to it in float32."""
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, tenths, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, tenths / 10)[1].tolist() == [0, 1]
    assert ops.nms(boxes, scores, tenths / 10 - 1e-6)[1].tolist() == [0]


def test_no_regions_give_no_output_and_no_gradient(ops):
    features = torch.ones(1, 2, 4, 4, requires_grad=True)
    output = ops.RoIAlign(7, 0.25)(features, torch.zeros(0, 5))
    output.sum().backward()
    assert output.shape == (0, 2, 7, 7)
    assert not features.grad.any()


def test_deformable_attention_as_a_gpu_asks_for_it(ops):
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    random = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[4, 5], [2, 3]])
    value = torch.randn(2, 26, 3, 4, generator=random)
    locations = torch.rand(2, 7, 3, 2, 2, 2, generator=random)
    weights = torch.rand(2, 7, 3, 2, 2, generator=random)
    upstream = torch.randn(2, 7, 12, generator=random)
    found = []
    for attend in (
        lambda v, p, w: MultiScaleDeformableAttnFunction.apply(v, shapes, torch.tensor([0, 20]), p, w, 64),
        lambda v, p, w: multi_scale_deformable_attn_pytorch(v, shapes, p, w),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
        output = attend(*leaves)
        (output * upstream).sum().backward()
        found.append([output, *(leaf.grad for leaf in leaves)])
    for ours, written_out in zip(*found, strict=True):
        torch.testing.assert_close(ours, written_out, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("soft", lambda ops: ops.soft_nms(torch.ones(2, 4), torch.ones(2), 0.5)),
        ("offset 1", lambda ops: ops.nms(torch.ones(2, 4), torch.ones(2), 0.5, 1)),
        ("max", lambda ops: ops.RoIAlign(2, pool_mode="max")(torch.ones(1, 1, 4, 4), torch.zeros(1, 5))),
        ("deform_conv", lambda ops: ops.deform_conv2d(
            torch.ones(1, 1, 4, 4), torch.zeros(1, 18, 2, 2), torch.ones(1, 1, 3, 3))),
        ("sigmoid_focal_loss", lambda ops: ops.sigmoid_focal_loss(torch.ones(2, 3), torch.tensor([0, 1]), 2.0, 0.25)),
    ],
)  # fmt: skip
def test_any_other_operator_says_that_it_is_not_there(ops, name, call):
    with pytest.raises(RunError, match=name) as caught:
        call(ops)
    assert "without compiled operators" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_mmcv_reports_of_itself(ops):
    assert "torchvision" in ops.get_compiler_version()
    assert ops.get_compiling_cuda_version() == "not available" or ops.get_compiling_cuda_version().isdigit()


def test_a_device_without_kernels_is_a_paragraph():
    code = """
from vitpipe.dense.mm_import import open_detection
from vitpipe.contracts.errors import RunError
open_detection("cpu")
try:
    open_detection("meta")  # torchvision has kernels for it only once its Python package is imported
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "cannot run on meta" in done.stdout
    assert "make setup" in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF, but of another torch"])
def test_a_missing_or_wrong_library_is_a_paragraph(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "_C.so").write_bytes(content)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr(operators, "find_spec", lambda name: spec)
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    with pytest.raises(RunError, match="torchvision's operators cannot be loaded") as caught:
        operators.register()
    assert "\n" not in str(caught.value)
    assert "mmcv._ext" not in sys.modules
