import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from vitpipe.datasets.embedded.outlines import bounding_box, polygons, run_lengths

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.booleans())


def rasterise(segmentation, mask):
    coco = pytest.importorskip("pycocotools.mask")
    parts = coco.frPyObjects(segmentation, *mask.shape)
    return coco.decode(coco.merge(parts) if isinstance(parts, list) else parts).astype(bool)


@given(masks)
def test_polygons_rasterise_to_the_very_mask(mask):
    outlines = polygons(mask)
    if not mask.any():
        assert outlines == []
        return
    assert all(len(outline) >= 8 and len(outline) % 2 == 0 for outline in outlines)
    np.testing.assert_array_equal(rasterise(outlines, mask), mask)


@given(masks)
def test_run_lengths_decode_to_the_very_mask(mask):
    runs = run_lengths(mask)
    assert sum(runs["counts"]) == mask.size
    np.testing.assert_array_equal(rasterise(runs, mask), mask)


def test_a_ring_is_cut_open_and_a_square_has_four_corners():
    square = np.zeros((6, 7), bool)
    square[1:5, 2:6] = True
    assert polygons(square) == [[2.0, 1.0, 6.0, 1.0, 6.0, 5.0, 2.0, 5.0]]
    ring = square.copy()
    ring[2:4, 3:5] = False
    assert len(polygons(ring)) > 1


def test_bounding_box_counts_pixels():
    mask = np.zeros((6, 7), bool)
    mask[2, 3] = mask[4, 5] = True
    assert bounding_box(mask) == [3.0, 2.0, 3.0, 3.0]
