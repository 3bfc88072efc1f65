"""Pictures of predictions: what is drawn is where it should be."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vitpipe.dense.pictures import DrawnObject, class_colours, draw_labels, draw_objects, write_sheet

GREY = np.full((64, 128, 3), 100, np.uint8)


def test_colours_differ():
    colours = class_colours(150)
    assert colours.shape == (150, 3)
    assert len({tuple(colour) for colour in colours.tolist()}) == 150


def test_masks_tint_only_themselves():
    mask = np.zeros((64, 128), bool)
    mask[16:48, 32:64] = True
    picture = draw_objects(GREY, [DrawnObject(0, (32, 16, 64, 48), mask, "one")], class_colours(2))
    # Drawn at twice the size.
    assert picture.shape == (128, 256, 3)
    assert not np.array_equal(picture[64, 100], [100, 100, 100])
    assert np.array_equal(picture[64, 200], [100, 100, 100])
    assert np.array_equal(GREY, np.full((64, 128, 3), 100))


def test_ignored_labels_stay_dark():
    labels = np.zeros((64, 128), int)
    labels[:, 64:] = 255
    picture = draw_labels(GREY, labels, class_colours(3))
    assert picture[0, 0].sum() > picture[0, 100].sum()
    assert picture[0, 100].max() < 100


def test_sheet_has_a_row_per_picture(tmp_path):
    path = tmp_path / "deep" / "sheet.png"
    write_sheet([(GREY, GREY), (GREY, GREY), (GREY, GREY)], ("truth", "found"), path)
    with Image.open(path) as sheet:
        assert sheet.width > 2 * 256
        assert sheet.height > 3 * 256
