"""Hashes are robust to re-encoding and resizing and separate images; the search equals brute force."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from vitpipe.datasets.bundled import bundled_file
from vitpipe.prepare.duplicates import (
    duplicate_rows,
    duplicate_sheet,
    grey_thumbnail,
    near_duplicates,
    perceptual_hash,
    perceptual_hashes,
)

PHOTOGRAPHS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "coins.png",
    "motorcycle_left.png",
)


def open_photograph(name):
    with Image.open(bundled_file("skimage", f"data/{name}")) as picture:
        return picture.convert("RGB")


@pytest.fixture(scope="module")
def photographs():
    return {name: open_photograph(name) for name in PHOTOGRAPHS}


def apart(one, other):
    return (one ^ other).bit_count()


def as_jpeg(picture, quality):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def brute_force(train, val, max_distance, max_pairs):
    found = []
    for position, wanted in enumerate(val.tolist()):
        near = sorted((apart(wanted, own), number) for number, own in enumerate(train.tolist()))
        own = [(number, position, distance) for distance, number in near if distance <= max_distance]
        found += own[:max_pairs]
    return sorted(found, key=lambda pair: (pair[2], pair[1], pair[0]))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(PHOTOGRAPHS), st.integers(40, 95), st.floats(0.3, 1.5))
def test_another_size_and_encoding_hardly_change_the_hash(name, quality, scale):
    picture = open_photograph(name)
    size = [round(side * scale) for side in picture.size]
    changed = as_jpeg(picture.resize(size, Image.Resampling.BICUBIC), quality)
    assert apart(perceptual_hash(changed), perceptual_hash(picture)) <= 4


def test_a_reduced_decoding_hardly_changes_the_hash(photographs):
    for picture in photographs.values():
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        with Image.open(buffer) as reduced:
            reduced.draft(None, (64, 64))
            assert apart(perceptual_hash(reduced), perceptual_hash(picture)) <= 4


def test_brightness_hardly_changes_the_hash(photographs):
    for picture in photographs.values():
        darker = ImageEnhance.Brightness(picture).enhance(0.8)
        assert apart(perceptual_hash(darker), perceptual_hash(picture)) <= 4


def test_different_pictures_are_far_apart(photographs):
    hashes = [perceptual_hash(picture) for picture in photographs.values()]
    hashes += [
        perceptual_hash(picture.transpose(Image.Transpose.ROTATE_90)) for picture in photographs.values()
    ]
    distances = [apart(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 12


def test_flat_pictures_have_hash_zero_and_modes_do_not_matter():
    for value in (0, 1, 77, 255):
        assert perceptual_hash(Image.new("L", (50, 20), value)) == 0
        assert perceptual_hash(Image.new("RGB", (7, 90), (value,) * 3)) == 0
    picture = open_photograph("chelsea.png")
    assert perceptual_hash(picture.convert("L")) == perceptual_hash(picture)
    assert 0 < perceptual_hash(picture) < 2**64


def test_the_hash_is_the_median_test_of_the_transform():
    """Against the definition, with scipy's transform."""
    from scipy.fft import dctn

    thumbnail = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    spectrum = dctn(thumbnail.astype(float))[1:9, 1:9].reshape(-1)
    expected = sum(1 << int(i) for i in np.flatnonzero(spectrum > np.median(spectrum)))
    assert apart(int(perceptual_hashes(thumbnail[None])[0]), expected) == 0


def test_many_at_once_equal_one_by_one(photographs):
    together = perceptual_hashes(np.stack([grey_thumbnail(p) for p in photographs.values()]))
    assert together.tolist() == [perceptual_hash(p) for p in photographs.values()]
    assert together.dtype == np.uint64


# Few distinct bits, so that near and equal hashes are common.
hashes = st.lists(
    st.builds(lambda base, flips: base ^ sum(1 << bit for bit in set(flips)),
              st.sampled_from([0, 0xF0F0_1234_5678_9ABC, 2**64 - 1]),
              st.lists(st.integers(0, 63), max_size=6)),
    max_size=40,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(hashes, hashes, st.integers(0, 8), st.integers(1, 50))
def test_the_search_equals_brute_force(train, val, max_distance, max_pairs):
    train, val = np.array(train, np.uint64), np.array(val, np.uint64)
    found = near_duplicates(train, val, max_distance, max_pairs=max_pairs)
    expected = brute_force(train, val, max_distance, max_pairs)
    assert list(map(tuple, found.pairs.tolist())) == expected
    everything = brute_force(train, val, max_distance, 10**9)
    counts = {position: sum(pair[1] == position for pair in everything) for _, position, _ in everything}
    assert found.num_val_images == len(counts)
    assert found.num_capped == sum(count > max_pairs for count in counts.values())


def test_the_search_in_small_pieces_finds_the_same(monkeypatch):
    rng = np.random.default_rng(3)
    centres = rng.integers(0, 2**64, 5, dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, 64, (3, 600)).astype(np.uint64)
    train = centres[rng.integers(0, 5, 600)] ^ np.bitwise_xor.reduce(flips, axis=0)
    val = centres[rng.integers(0, 5, 50)]
    whole = near_duplicates(train, val, 4, max_pairs=7)
    monkeypatch.setattr("vitpipe.prepare.duplicates._COMPARED_AT_ONCE", 64)
    monkeypatch.setattr("vitpipe.prepare.duplicates._KEPT_BEFORE_PRUNING", 100)
    pieces = near_duplicates(train, val, 4, max_pairs=7)
    assert pieces.pairs.tolist() == whole.pairs.tolist()
    assert pieces.num_capped == whole.num_capped == 50


def test_flat_images_do_not_blow_up():
    train = np.zeros(300_000, np.uint64)
    train[7] = 1
    found = near_duplicates(train, np.zeros(3_000, np.uint64), max_pairs=5)
    assert len(found.pairs) == 3_000 * 5
    assert found.pairs[:5, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.num_capped == 3_000
    assert "only the nearest 5" in found.describe()


def test_nothing_to_find():
    empty = np.empty(0, np.uint64)
    for train, val in ((empty, empty), (empty, np.ones(3, np.uint64)), (np.ones(3, np.uint64), empty)):
        found = near_duplicates(train, val)
        assert found.pairs.shape == (0, 3)
        assert found.describe().startswith("no validation image")
    with pytest.raises(ValueError, match="0 to 16"):
        near_duplicates(empty, empty, 17)


@pytest.fixture
def found(photographs):
    pictures = list(photographs.values())
    train = np.array([perceptual_hash(p) for p in pictures], np.uint64)
    val = np.array([perceptual_hash(as_jpeg(p, 50)) for p in pictures[:3]], np.uint64)
    return near_duplicates(train, val)


def test_rows_name_both_images_and_their_classes(found):
    rows = duplicate_rows(
        found,
        lambda split, position: f"{split}/{position}",
        train_labels=np.array([0, 1, 2, 0, 0, 0, 0]),
        val_labels=np.array([0, 1, 1]),
        classes=("a", "b", "c"),
    )
    assert {(row["val_image"], row["train_image"], row["same_class"]) for row in rows} == {
        ("val/0", "train/0", "yes"), ("val/1", "train/1", "yes"), ("val/2", "train/2", "no"),
    }  # fmt: skip
    assert {row["train_class"] for row in rows} == {"a", "b", "c"}
    assert [row["distance"] for row in rows] == sorted(row["distance"] for row in rows)
    assert len(duplicate_rows(found, lambda *place: "", train_labels=np.zeros(7, int), val_labels=np.zeros(3, int),
                              classes=("a",), max_rows=2)) == 2  # fmt: skip


def test_the_sheet_shows_pairs_side_by_side(found, photographs, tmp_path):
    pictures, asked = list(photographs.values()), []

    def read(split, position):
        asked.append((split, position))
        return pictures[position]

    assert duplicate_sheet(found, read, tmp_path / "pairs.png")
    assert set(asked) == {(split, number) for split in ("train", "val") for number in range(3)}
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.size[0] > 3 * 320
        left, right = sheet.crop((8, 8, 168, 168)), sheet.crop((170, 8, 330, 168))
        assert np.abs(np.asarray(left, float) - np.asarray(right, float)).mean() < 30
    nothing = near_duplicates(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    assert not duplicate_sheet(nothing, read, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
