"""J and F: the recorded numbers of the official code, the rules for empty and foreign labels, and properties."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_dilation
from selfpatch_golden import ENTRIES

from vitpipe.contracts.errors import InputError
from vitpipe.evaluate.video_metrics import (
    boundary_map,
    frame_statistics,
    mean_scores,
    score_frame,
    score_video,
    tolerance_of,
)

NAMES = [f"{measure}_{name}" for measure in "JF" for name in ("mean", "recall", "decay")]


def mask_of(shapes, size) -> np.ndarray:
    """The union of the shapes of a golden entry."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    mask = np.zeros(size, bool)
    for kind, *numbers in shapes:
        if kind == "disc":
            y, x, radius = numbers
            mask |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        else:
            top, left, bottom, right = numbers
            mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("case", ENTRIES["davis_JF"]["record"], ids=lambda case: case["case"])
def test_frames_have_the_recorded_numbers(case):
    true, found = (mask_of(case[key], case["size"]) for key in ("ground_truth", "result"))
    boundary = boundary_map(true).astype(np.uint8)
    assert zlib.crc32(boundary.tobytes()) == case["gt_boundary"]["crc32_uint8"]
    assert tolerance_of(*case["size"]) == case["tolerance_pixels"]
    region, contour = score_frame(true.astype(np.uint8), found.astype(np.uint8), 1)
    assert region[0] == pytest.approx(case["J"], abs=1e-12)
    assert contour[0] == pytest.approx(case["F"], abs=1e-12)


def test_a_sequence_has_the_recorded_numbers():
    entry = ENTRIES["davis_sequence"]

    def maps(key):
        found = [np.zeros(entry["size"], np.uint8) for _ in range(entry["frames"])]
        for number, shapes in enumerate(entry["objects"], start=1):
            for labels, frame in zip(found, shapes[key], strict=True):
                labels[mask_of(frame, entry["size"])] = number
        return found

    scores = score_video("clip", maps("gt per frame"), maps("result per frame"))
    recorded = entry["record"]
    for number, expected in enumerate(recorded["per_object"]):
        assert scores.region[number] == pytest.approx(expected["J_per_frame"], abs=1e-6)
        assert scores.boundary[number] == pytest.approx(expected["F_per_frame"], abs=1e-6)
        found = scores.statistics()[number]
        assert [found[name] for name in NAMES] == pytest.approx([expected[name] for name in NAMES], abs=1e-12)
    means = mean_scores(scores.statistics())
    assert means["J_mean"] == pytest.approx(recorded["J"], abs=1e-12)
    assert means["F_mean"] == pytest.approx(recorded["F"], abs=1e-12)
    assert means["JF_mean"] == pytest.approx(recorded["J&F"], abs=1e-12)


label_maps = arrays(np.uint8, (9, 12), elements=st.integers(0, 3))
masks = arrays(np.bool_, (11, 13))


@given(label_maps, label_maps)
def test_measures_are_symmetric_and_in_their_bounds(one, other):
    there, back = score_frame(one, other, 3), score_frame(other, one, 3)
    for first, second in zip(there, back, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-12)
        assert ((first >= 0) & (first <= 1)).all()


@given(label_maps)
def test_a_perfect_result_is_one(labels):
    for scores in score_frame(labels, labels, 3):
        assert scores.tolist() == [1.0, 1.0, 1.0]


@given(masks)
def test_boundaries_are_those_of_the_written_out_rule(mask):
    expected = np.zeros_like(mask)
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            inside = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            others = [mask[place] for place in inside if place[0] < height and place[1] < width]
            expected[y, x] = any(other != mask[y, x] for other in others)
    assert (boundary_map(mask) == expected).all()


@given(masks, masks, st.integers(1, 3))
def test_f_is_that_of_dilated_boundaries(true, found, tolerance):
    from vitpipe.evaluate.video_metrics import boundary_measure, boundary_points

    offsets = np.mgrid[-tolerance : tolerance + 1, -tolerance : tolerance + 1]
    disc = (offsets**2).sum(axis=0) <= tolerance**2
    edges = [boundary_map(mask) for mask in (true, found)]
    near = [binary_dilation(edge, disc) for edge in edges]
    recall, precision = (
        (edge & other).sum() / edge.sum() if edge.any() else 1.0
        for edge, other in zip(edges, reversed(near), strict=True)
    )
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    points = [boundary_points(mask.astype(np.uint8), 1)[0] for mask in (true, found)]
    # The rule for one empty boundary: one of the two shares is 0.
    if not edges[0].any() or not edges[1].any():
        expected = float(edges[0].any() == edges[1].any())
    assert boundary_measure(*points, tolerance) == pytest.approx(expected, abs=1e-12)


def test_the_frame_s_own_border_is_no_boundary():
    assert not boundary_map(np.ones((5, 6), bool)).any()
    full, empty = np.ones((5, 6), np.uint8), np.zeros((5, 6), np.uint8)
    # Regions differ in every pixel, both boundaries are empty.
    region, contour = score_frame(full, empty, 1)
    assert (region[0], contour[0]) == (0.0, 1.0)


def test_empty_masks():
    disc = mask_of([["disc", 10, 10, 5]], (20, 30)).astype(np.uint8)
    empty = np.zeros_like(disc)
    for true, found, expected in ((empty, empty, 1.0), (disc, empty, 0.0), (empty, disc, 0.0)):
        region, contour = score_frame(true, found, 1)
        assert (region[0], contour[0]) == (expected, expected)


def test_the_first_and_the_last_frame_are_not_scored():
    disc = mask_of([["disc", 10, 10, 5]], (20, 30)).astype(np.uint8)
    nothing = np.zeros_like(disc)
    scores = score_video("clip", [disc] * 4, [nothing, disc, disc, nothing])
    assert scores.region.tolist() == [[1.0, 1.0]]
    for length in (1, 2):
        short = score_video("clip", [disc] * length, [disc] * length)
        assert (short.num_frames, short.region.shape, short.statistics()) == (0, (1, 0), [])


def test_objects_are_those_of_the_first_annotation():
    first = np.zeros((12, 12), np.uint8)
    first[2:6, 2:6] = 1
    later = first.copy()
    later[8:11, 8:11] = 2  # appears later: background
    scores = score_video("clip", [first, later, later], [first, first, first])
    assert scores.region.tolist() == scores.boundary.tolist() == [[1.0]]
    with pytest.raises(InputError, match="label 2, but the video has 1 objects"):
        score_video("clip", [first, later, later], [first, later, later])


def test_label_255_is_background():
    labels = np.zeros((12, 12), np.uint8)
    labels[2:6, 2:6] = 1
    marked = labels.copy()
    marked[8:, :] = 255
    scores = score_video("clip", [marked, marked, marked], [labels] * 3)
    assert scores.region.tolist() == scores.boundary.tolist() == [[1.0]]


def test_a_label_that_the_first_annotation_leaves_out_is_an_object_all_the_same():
    labels = np.zeros((12, 12), np.uint8)
    labels[2:6, 2:6] = 3
    scores = score_video("clip", [labels] * 3, [np.zeros_like(labels)] * 3)
    # Labels 1 and 2 are empty in both, which counts as equal.
    assert scores.region.ravel().tolist() == [1.0, 1.0, 0.0]


def test_maps_that_do_not_pair_are_refused():
    labels = np.ones((4, 4), np.uint8)
    with pytest.raises(InputError, match="3 annotations and 2 result maps"):
        score_video("clip", [labels] * 3, [labels] * 2)
    with pytest.raises(InputError, match="annotation"):
        score_video("clip", [labels] * 3, [np.ones((5, 4), np.uint8)] * 3)


@pytest.mark.parametrize(
    ("number", "first", "last"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (7, 3, 2), (300, 76, 76)]
)
def test_quarters_round_halves_up_and_share_their_ends(number, first, last):
    # The official code: numpy's round to even would give 2 and 3 for 7 frames; its cuts are 8-bit numbers,
    # which is wrong from 257 frames on and is not repeated here.
    values = np.arange(number, dtype=float) ** 2
    expected = values[:first].mean() - values[number - last :].mean()
    assert frame_statistics(values).decay == pytest.approx(expected)


@given(arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1)))
def test_statistics_are_shares(values):
    found = frame_statistics(values)
    assert 0 <= found.mean <= 1
    assert 0 <= found.recall <= 1
    assert -1 <= found.decay <= 1
    assert math.isclose(found.mean, float(values.mean()))


def test_the_mean_is_over_objects_and_not_over_videos():
    rows = [dict.fromkeys(NAMES, value) for value in (0.0, 0.0, 0.9)]
    assert mean_scores(rows)["JF_mean"] == pytest.approx(0.3)
