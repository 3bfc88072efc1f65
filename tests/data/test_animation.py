"""Animations: frames, note, time, and a disk that refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitpipe.contracts.errors import StorageError
from vitpipe.data.animation import captioned, write_animation
from vitpipe.data.image_grid import note_of


def test_frames_note_and_time(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    frames = [np.full((20, 30, 3), colour, np.uint8) for colour in colours]
    path = tmp_path / "new/moves.gif"
    write_animation(path, frames, frame_ms=120, note="Three colours: é")
    assert note_of(path) == "Three colours: é"
    with Image.open(path) as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (3, (30, 20), 0)
        for number, colour in enumerate(colours):
            picture.seek(number)
            assert picture.info["duration"] == 120
            shown = np.asarray(picture.convert("RGB")).astype(int)
            assert np.abs(shown - colour).max() <= 8


def test_a_caption_stays_inside_and_leaves_the_image_as_it_was():
    image = np.full((40, 60, 3), 128, np.uint8)
    drawn = captioned(image, "J&F")
    assert drawn.shape == image.shape
    assert (image == 128).all()
    assert (drawn[30:] == 128).all()
    assert drawn.max() > 240


def test_a_disk_that_refuses_is_an_error(tmp_path):
    (tmp_path / "moves.gif").symlink_to("/dev/full")
    with pytest.raises(StorageError):
        write_animation(tmp_path / "moves.gif", [np.zeros((4, 4, 3), np.uint8)], frame_ms=100)
