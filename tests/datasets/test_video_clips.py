"""DAVIS's videos: how frames and labels are read, and what is refused."""

from __future__ import annotations

import io
import shutil
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from selfpatch_golden import ENTRIES, TOLERANCE, error
from selfpatch_golden import fill as golden_fill

from vitpipe.contracts.errors import DatasetError, RunError
from vitpipe.datasets.davis_palette import davis_palette
from vitpipe.datasets.layouts.davis import listed_sequences
from vitpipe.datasets.video_clips import (
    clips_of,
    first_labels,
    indexed_png,
    network_size,
    read_frame,
    read_labels,
)
from vitpipe.evaluate.video_masks import normalised

READING = ENTRIES["davis_reading"]


@pytest.mark.parametrize("number", range(len(READING["input"]["sizes"])))
def test_frames_and_labels_are_read_as_recorded(number, tmp_path):
    height, width = READING["input"]["sizes"][number]
    recorded = READING["record"][f"{height}x{width}"]
    pixels = (40 * golden_fill.probe((height, width, 3), 760 + number) + 128).clamp(0, 255)
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "frame.png")
    rows, columns = np.mgrid[:height, :width]
    Image.fromarray((rows // 7 + columns // 11).astype(np.uint8) % 4).save(tmp_path / "labels.png")
    size = network_size(height, width, 480, 64)
    assert list(size) == recorded["network input size"]
    frame = normalised(torch.from_numpy(read_frame(tmp_path / "frame.png", size))[None])[0]
    assert error(frame, recorded["frame"]) < TOLERANCE
    labels = first_labels(read_labels(tmp_path / "labels.png"), (size[0] // 16, size[1] // 16))
    expected = recorded["first labels on the patch grid"]
    assert list(labels.shape) == expected["shape"]
    assert zlib.crc32(np.ascontiguousarray(labels).tobytes()) == expected["crc32_uint8"]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 854, (480, 832)), (480, 910, (480, 896)), (854, 480, (832, 480)), (480, 480, (480, 448))],
)
def test_the_size_rule(height, width, expected):
    assert network_size(height, width, 480, 64) == expected


def test_label_255_becomes_background():
    labels = np.array([[0, 255], [2, 255]], np.uint8)
    assert first_labels(labels, (2, 2)).tolist() == [[0, 0], [2, 0]]


def test_masks_are_indexed_files_with_the_palette_of_davis():
    labels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    picture = Image.open(io.BytesIO(indexed_png(labels)))
    assert picture.mode == "P"
    assert picture.getpalette()[:12] == davis_palette()[:12]
    assert (np.asarray(picture) == labels).all()


def test_clips_come_in_the_order_of_the_list(raw):
    (clip,) = clips_of(raw / "davis")
    assert (clip.name, len(clip)) == ("digits-val-00", 3)
    assert [path.name for path in clip.frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert [path.stem for path in clip.annotations] == [path.stem for path in clip.frames]
    assert clip.size == np.asarray(Image.open(clip.frames[0])).shape[:2]


def video(root, kind):
    return root / "davis" / kind / "480p" / "digits-val-00"


def rgb_annotation(root):
    path = video(root, "Annotations") / "00001.png"
    Image.open(path).convert("RGB").save(path)


def missing_frame(root):
    (video(root, "JPEGImages") / "00001.jpg").unlink()


def missing_annotation(root):
    (video(root, "Annotations") / "00001.png").unlink()


def other_size(root):
    path = video(root, "JPEGImages") / "00002.jpg"
    Image.open(path).resize((40, 30)).save(path)


def other_annotation_size(root):
    path = video(root, "Annotations") / "00002.png"
    Image.open(path).resize((40, 30), Image.Resampling.NEAREST).save(path)


def no_object(root):
    path = video(root, "Annotations") / "00000.png"
    Image.fromarray(np.asarray(Image.open(path)) // 4 * 255).save(path)


def no_picture(root):
    (video(root, "JPEGImages") / "00001.jpg").write_bytes(b"nothing")


def no_frames(root):
    shutil.rmtree(video(root, "JPEGImages"))


def no_list(root):
    (root / "davis/ImageSets/2017/val.txt").unlink()


def empty_list(root):
    (root / "davis/ImageSets/2017/val.txt").write_text("\n")


def twice(root):
    (root / "davis/ImageSets/2017/val.txt").write_text("digits-val-00\ndigits-val-01\ndigits-val-00\n")


def test_names_in_a_list_are_lines(raw_copy):
    """With blanks in them, and behind the byte order mark of an editor."""
    for kind in ("JPEGImages", "Annotations"):
        video(raw_copy, kind).rename(raw_copy / "davis" / kind / "480p" / "my video")
    listing = raw_copy / "davis/ImageSets/2017/val.txt"
    listing.write_text("\ufeffmy video\r\n\n", encoding="utf-8")
    assert [clip.name for clip in clips_of(raw_copy / "davis")] == ["my video"]
    assert listed_sequences(listing.read_bytes(), listing) == ["my video"]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (rgb_annotation, "mode RGB, not a label map"),
        (missing_frame, r"1 files of the video 'digits-val-00' are missing: 00001\.jpg"),
        (missing_annotation, r"1 files of the video 'digits-val-00' are missing: 00001\.png"),
        (other_size, r"another size than its first frame.*JPEGImages/00002\.jpg"),
        (other_annotation_size, r"another size than its first frame.*Annotations/00002\.png"),
        (no_object, "shows no object"),
        (no_picture, "cannot be read"),
        (no_frames, "has no frames"),
        (no_list, "list of videos is missing"),
        (empty_list, "names no video"),
        (twice, "more than once: digits-val-00"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_followed_is_refused(raw_copy, damage, what):
    damage(raw_copy)
    with pytest.raises(DatasetError, match=what):
        clips_of(raw_copy / "davis")


def test_damage_behind_the_header_is_found_when_a_frame_is_read(raw_copy):
    path = video(raw_copy, "JPEGImages") / "00001.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    clips_of(raw_copy / "davis")
    with pytest.raises(DatasetError, match=r"cannot be read.*00001\.jpg"):
        read_frame(path, (64, 64))


def test_without_opencv_the_extra_is_named(raw, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RunError, match="extra 'dense'"):
        read_frame(clips_of(raw / "davis")[0].frames[0], (64, 64))
