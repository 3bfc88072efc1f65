"""Image grids: sizes, captions and overlays are where they should be, for odd images and odd predictions, too."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitpipe.contracts.errors import StorageError
from vitpipe.data.image_grid import (
    DrawnObject,
    Section,
    Tile,
    class_colours,
    draw_labels,
    draw_masks,
    draw_objects,
    fit,
    legend_of,
    note_of,
    optional_figure,
    side_by_side,
    write_grid,
)

GREY = np.full((64, 128, 3), 100, np.uint8)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def square(top, left, bottom, right):
    mask = np.zeros((64, 128), bool)
    mask[top:bottom, left:right] = True
    return mask


def read(path):
    with Image.open(path) as sheet:
        return np.asarray(sheet)


def test_drawing_does_not_import_torch(tmp_path):
    code = """
import sys
from pathlib import Path
import numpy as np
from vitpipe.data.image_grid import DrawnObject, Section, Tile, class_colours, draw_objects, write_grid
image = np.zeros((20, 30, 3), np.uint8)
thing = DrawnObject(0, (2, 2, 9, 9), np.ones((20, 30), bool), "thing")
write_grid(Path(sys.argv[1]), [Section("a", [Tile(draw_objects(image, [thing], class_colours(2), 60))])], columns=2)
assert not {'torch', 'torchvision'} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "sheet.png")], check=True)


def test_colours_differ():
    colours = class_colours(150)
    assert colours.shape == (150, 3)
    assert len({tuple(colour) for colour in colours.tolist()}) == 150


@given(st.integers(1, 300), st.integers(1, 300))
def test_fitted_images_have_the_side_and_keep_their_ratio(height, width):
    fitted = fit(np.zeros((height, width, 3), np.uint8), 64)
    assert max(fitted.shape[:2]) == 64
    assert min(fitted.shape[:2]) == max(1, round(64 * min(height, width) / max(height, width)))


def test_masks_tint_only_themselves_and_the_first_is_on_top():
    first, second = square(16, 32, 48, 64), square(16, 48, 48, 80)
    drawn = draw_masks(GREY, [first, second], [RED, BLUE], opacity=0.5)
    assert drawn[20, 40].tolist() == drawn[20, 50].tolist() == [177, 50, 50]
    assert drawn[20, 70].tolist() == [50, 50, 177]
    assert np.array_equal(drawn[~(first | second)], GREY[~(first | second)])
    assert (GREY == 100).all()


def test_objects_are_drawn_at_the_size_that_is_asked_for():
    mask = square(16, 32, 48, 64)
    drawn = draw_objects(GREY, [DrawnObject(0, (32, 16, 64, 48), mask, "")], class_colours(1), 256)
    assert drawn.shape == (128, 256, 3)
    colour = class_colours(1)[0]
    assert drawn[64, 64].tolist() == drawn[32, 100].tolist() == colour.tolist(), "the frame"
    assert not np.array_equal(drawn[64, 100], [100, 100, 100]), "the mask"
    assert np.array_equal(drawn[64, 200], [100, 100, 100])


@pytest.mark.parametrize(
    "box",
    [
        (64, 48, 32, 16),
        (float("nan"), 0, float("inf"), 5),
        (-900, -900, 900, 900),
        (127.9, 63.9, 127.9, 63.9),
    ],
)
def test_any_prediction_can_be_drawn(box):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objects = [DrawnObject(9, box, np.zeros((64, 128), bool), "a very long class name 0.99")]
        assert draw_objects(GREY, objects, class_colours(2), 64).shape == (32, 64, 3)
        assert draw_objects(GREY, [], class_colours(2), 64).shape == (32, 64, 3)


def test_labels_at_the_edge_are_moved_into_the_image():
    mask = np.zeros((64, 128), bool)
    drawn = draw_objects(GREY, [DrawnObject(0, (120, 60, 127, 63), mask, "elephant")], class_colours(1), 128)
    white = np.argwhere((drawn > 180).all(axis=2))
    assert np.ptp(white[:, 1]) > 30
    assert white[:, 1].max() <= 126
    assert white[:, 0].max() <= 62


def test_ignored_labels_turn_dark():
    labels = np.zeros((64, 128), int)
    labels[:, 64:96] = 255
    labels[:, 96:] = -1
    drawn = draw_labels(GREY, labels, class_colours(3))
    assert drawn[0, 0].sum() > drawn[0, 70].sum()
    assert np.array_equal(drawn[0, 70], drawn[0, 100])
    assert drawn[0, 70].max() < 100


def test_pairs_are_aligned_at_the_bottom():
    pair = side_by_side([np.full((10, 20, 3), 7, np.uint8), np.full((30, 20, 3), 9, np.uint8)])
    assert pair.shape == (30, 42, 3)
    assert (pair[20:, :20] == 7).all()
    assert (pair[:20, :20] == 255).all()
    assert (pair[:, 22:] == 9).all()


def test_rows_and_columns(tmp_path):
    path = tmp_path / "deep" / "sheet.png"
    tiles = [Tile(np.full((height, 20, 3), 9, np.uint8)) for height in (20, 10, 10, 10, 5)]
    write_grid(path, [Section("", tiles)], columns=2)
    sheet = read(path)
    assert sheet.shape == (8 + 20 + 8 + 10 + 8 + 5 + 8, 8 + 20 + 8 + 20 + 8, 3)
    dark = (sheet == 9).all(axis=2)
    assert dark.sum() == 20 * (20 + 10 + 10 + 10 + 5)
    assert dark[27, [8, 36]].all(), "aligned at the bottom"
    assert not dark[17, 36]
    assert sheet[dark == 0].min() == 255


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=3), st.integers(1, 4))
def test_any_number_of_tiles_and_columns(tmp_path_factory, counts, columns):
    path = tmp_path_factory.mktemp("grids") / "sheet.png"
    sections = [Section("title", [Tile(GREY, "caption")] * count) for count in counts]
    write_grid(path, sections, columns=columns)
    sheet = read(path)
    found = (sheet == 100).all(axis=2).sum()
    # Anti-aliased letters have grey pixels, too.
    assert 0 <= found - sum(counts) * 64 * 128 < 0.1 * max(1, found)


def test_captions_and_titles_are_below_and_above_and_never_cut(tmp_path):
    tile = Tile(GREY, "a caption that is much wider than the tile below which it stands")
    write_grid(tmp_path / "sheet.png", [Section("title", [tile, Tile(GREY, "short")])], columns=2)
    sheet = read(tmp_path / "sheet.png")
    image = (sheet == 100).all(axis=2)[:, 8:136].all(axis=1)
    top, bottom = np.flatnonzero(image)[[0, -1]]
    letters = (sheet < 90).all(axis=2)
    assert letters[:top].any()
    assert letters[bottom + 1 :, 8:136].any()
    assert letters[bottom + 1 :, 144:].any()
    # Nothing between the columns, at the sides or in the lowest rows.
    assert not letters[bottom + 1 :, 136:144].any()
    assert not letters[:, -8:].any()
    assert not letters[-8:].any()


def test_a_full_disk_is_a_storage_error(tmp_path):
    (tmp_path / "sheet.png").symlink_to("/dev/full")
    with pytest.raises(StorageError):
        write_grid(tmp_path / "sheet.png", [Section("", [Tile(GREY)])], columns=1)


def test_a_failed_figure_is_reported_and_a_full_disk_is_raised():
    lines = []
    with optional_figure("predictions", lines.append):
        raise ValueError("boxes are odd")
    assert len(lines) == 1
    assert "predictions was not drawn (ValueError: boxes are odd)" in lines[0]
    with pytest.raises(StorageError), optional_figure("predictions", lines.append):
        raise StorageError("The disk is full")


def test_titles_of_columns_and_a_legend_are_drawn_and_named(tmp_path):
    colours = class_colours(3)
    maps = [np.array([[0, 0], [2, 255]]), np.array([[2, 2], [-1, 0]])]
    legend = legend_of(maps, colours, ("sky", "sea", "sand"))
    assert [name for _, name in legend] == ["sky", "sand", "ignored"]
    assert [name for _, name in legend_of([maps[0][:1]], colours, ("sky", "sea", "sand"))] == ["sky"]
    assert legend_of([], colours, ("sky", "sea", "sand")) == []
    path, plain = tmp_path / "sheet.png", tmp_path / "plain.png"
    tiles = [Tile(GREY)] * 2
    write_grid(plain, [Section("", tiles)], columns=2)
    write_grid(path, [Section("", tiles, ("left", "right"), legend)], columns=2, note="why 'these' ✓")
    sheet = read(path)
    assert sheet.shape[0] > read(plain).shape[0]
    image = (sheet == 100).all(axis=2)[:, 8:136].all(axis=1)
    top, bottom = np.flatnonzero(image)[[0, -1]]
    for left in (8, 144):
        assert (sheet[:top, left : left + 128] < 90).all(axis=2).any(), "a title above each column"
    below = sheet[bottom + 1 :].reshape(-1, 3)
    for colour, _ in legend:
        assert (below == colour).all(axis=1).sum() >= 14 * 14
    assert note_of(path) == "why 'these' ✓"
    assert note_of(plain) == ""


def test_a_long_legend_takes_several_lines(tmp_path):
    entries = [((200, 0, number), f"class number {number}") for number in range(20)]
    write_grid(tmp_path / "sheet.png", [Section("", [Tile(GREY)], legend=entries)], columns=1)
    sheet = read(tmp_path / "sheet.png")
    assert sheet.shape[1] == 8 + 128 + 8
    assert all((sheet == colour).all(axis=2).any() for colour, _ in entries)


def test_labels_of_boxes_at_one_place_stand_below_each_other():
    mask = np.zeros((64, 128), bool)
    boxes = [DrawnObject(0, (10, 10, 60, 60), mask, "seven") for _ in range(3)]
    one, three = (draw_objects(GREY, boxes[:n], class_colours(1), 128) for n in (1, 3))

    def rows(image):
        return np.flatnonzero((image > 180).all(axis=2).any(axis=1))

    assert np.array_equal(rows(three)[: len(rows(one))], rows(one)), "the first keeps its place"
    assert rows(three)[-1] >= rows(one)[-1] + 16
