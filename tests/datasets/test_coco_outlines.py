"""Run lengths of COCO in both codings, against the COCO API's own coding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vitpipe.datasets.layouts.coco_outlines import area_of, mask_of, outline_of


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_compressed_run_lengths_are_those_of_the_coco_api(seed, height, width, share):
    from faster_coco_eval import mask as coding

    mask = np.random.default_rng(seed).random((height, width)) < share
    code = coding.encode(np.asfortranarray(mask.astype(np.uint8)))
    segmentation = {"size": [height, width], "counts": code["counts"].decode()}
    assert np.array_equal(mask_of(segmentation, height, width), mask)
    outline = outline_of(segmentation)
    assert area_of(outline) == mask.sum()
    assert (outline.problem == "no outline") == (not mask.any())


@given(st.text(max_size=12))
@settings(max_examples=200, deadline=None)
def test_no_text_of_run_lengths_raises(text):
    assert outline_of({"size": [3, 4], "counts": text}).problem in (
        "",
        "no outline",
        "run lengths that do not fill their size",
    )
