import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.seeds import generator_of
from vitpipe.datasets import bundled
from vitpipe.datasets.embedded.digits import NUM_DIGITS, Pose, draw_digit, scans
from vitpipe.datasets.embedded.scenes import (
    NOTHING,
    Canvas,
    Sprite,
    compose_scene,
    compose_single,
    compose_video,
)
from vitpipe.datasets.embedded.textures import TEXTURES, crop_coin, crop_texture


def test_train_and_val_share_no_scan():
    train = {scan.tobytes() for digit in scans("train") for scan in digit}
    val = {scan.tobytes() for digit in scans("val") for scan in digit}
    assert len(train) + len(val) > 1700
    assert not train & val
    assert all(len(digit) > 30 for split in ("train", "val") for digit in scans(split))


@given(st.floats(12, 80), st.floats(-30, 30), st.integers(0, 9))
def test_a_digit_has_about_the_height_asked_for(height, turn, digit):
    cover = draw_digit(scans("val")[digit][0], Pose(height, turn))
    assert 0.0 <= cover.min() <= cover.max() <= 1.0
    assert 0.6 * height - 2 <= cover.shape[0] <= 1.5 * height + 2


@pytest.mark.parametrize("texture", TEXTURES, ids=lambda texture: texture.name)
def test_textures_are_crops_in_range_and_never_flat(texture):
    crop = crop_texture(texture, 40, 24, generator_of("test", texture.name))
    assert crop.shape == (24, 40, 3)
    assert 0.0 <= crop.min() < crop.max() <= 1.0


def test_a_coin_is_round():
    colour, cover = crop_coin(20, generator_of("coin"))
    assert colour.shape == (20, 20, 3)
    assert cover[10, 10] == 1.0
    assert cover[0, 0] == 0.0


def test_a_later_thing_hides_an_earlier_one():
    canvas = Canvas(np.zeros((10, 10, 3), np.float32), np.ones((10, 10), np.uint8))
    block = Sprite(np.ones((4, 4), np.float32), np.array([1.0, 0.0, 0.0], np.float32))
    canvas.paste(block, 0, 0, 0)
    canvas.paste(block, 2, 2, 1)
    canvas.paste(block, 8, 8, 2)
    assert (canvas.owner == 0).sum() == 12
    assert (canvas.owner == 1).sum() == 16
    assert (canvas.owner == 2).sum() == 4
    assert not canvas.accepts(canvas.footprint(block, 0, 1), may_overlap=True)
    assert canvas.accepts(canvas.footprint(block, 5, 5), may_overlap=True)
    assert not canvas.accepts(canvas.footprint(block, 5, 5), may_overlap=False)
    assert not canvas.accepts(canvas.footprint(block, 9, 9), may_overlap=True)


def test_masks_of_a_scene_do_not_overlap_and_cover_what_changed():
    scene = compose_scene("train", 96, generator_of("scene", 3), num_things=5, with_crowd=True)
    stacked = np.stack([thing.mask for thing in scene.things])
    assert stacked.sum(0).max() == 1
    assert sum(thing.is_crowd for thing in scene.things) == 1
    assert all(thing.mask.any() and 0 <= thing.digit < NUM_DIGITS for thing in scene.things)
    assert scene.image.shape == (*scene.stuff.shape, 3)
    assert scene.stuff.max() <= len(TEXTURES)


def test_an_empty_scene_has_no_things():
    assert compose_scene("val", 64, generator_of(1), num_things=0, with_crowd=False).things == ()


def test_a_scene_depends_on_its_generator_alone():
    first = compose_scene("train", 64, generator_of("same"), num_things=3, with_crowd=False)
    again = compose_scene("train", 64, generator_of("same"), num_things=3, with_crowd=False)
    other = compose_scene("train", 64, generator_of("other"), num_things=3, with_crowd=False)
    assert np.array_equal(first.image, again.image)
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_things_of_a_video_keep_their_numbers_and_move():
    frames = compose_video("train", 96, 6, generator_of("video"), num_things=2)
    assert {tuple(thing.digit for thing in frame.things) for frame in frames} == {
        tuple(thing.digit for thing in frames[0].things)
    }
    assert any(not np.array_equal(frames[0].things[k].mask, frames[-1].things[k].mask) for k in range(2))


def test_a_single_digit_fills_the_shorter_side():
    image = compose_single(4, None, "train", 48, generator_of("single"))
    assert min(image.shape[:2]) == 48
    assert NOTHING == -1


def test_a_package_without_its_data_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"skimage.*requirements\.lock"):
        bundled.bundled_file("skimage", "data/absent.png")
    with pytest.raises(DatasetError, match="no_such_package"):
        bundled.bundled_file("no_such_package", "data/absent.png")
