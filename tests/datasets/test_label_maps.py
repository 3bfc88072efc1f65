"""Odd label maps of ADE20K and DAVIS: what is read correctly passes, the rest is named before it is packed."""

import numpy as np
import pytest
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.layouts import inspected, verified

SIDE = 32
LABELS = np.zeros((SIDE, SIDE), np.uint8)
LABELS[:12], LABELS[12:24, :16], LABELS[24:, 16:] = 1, 150, 7


def grey(labels, path):
    Image.fromarray(labels.astype(np.uint8)).save(path)


def palette(labels, path):
    picture = Image.fromarray(labels.astype(np.uint8)).convert("P")
    picture.putdata(labels.ravel().tolist())
    picture.putpalette([number * 37 % 256 for number in range(768)])
    picture.save(path)


def wide(labels, path):
    Image.fromarray(labels.astype(np.uint16)).save(path)


def colours(labels, path):
    Image.fromarray(np.stack([labels.astype(np.uint8)] * 3, -1)).save(path)


def rooms(folder, change=lambda labels: labels, save=grey, suffix=".jpg"):
    """Two training and two validation pictures in ADE20K's layout."""
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (SIDE, SIDE), "grey").save(folder / "images" / split / f"a{number}{suffix}")
            save(change(LABELS.astype(int)), folder / "annotations" / split / f"a{number}.png")
    return folder


def refusal(kind, root):
    with pytest.raises(DatasetError) as refused:
        inspected(verified(kind, root, kind))
    assert refused.value.where
    assert refused.value.fix
    return refused.value.what


@pytest.mark.parametrize("save", [grey, palette, wide])
def test_every_mode_with_one_label_per_pixel_passes(tmp_path, save):
    inspected(verified("ade20k", rooms(tmp_path, save=save), "ade20k"))


def test_ignored_pixels_are_no_error(tmp_path):
    root = rooms(tmp_path, lambda labels: np.where(labels == 0, 255, labels))
    inspected(verified("ade20k", root, "ade20k"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda labels: np.where(labels == 0, 255, labels - 1), "seem to count classes from 0: 150"),
        (lambda labels: labels + 10, r"labels above 150, the number of classes"),
        (lambda labels: labels * 0, "No label map has a labelled pixel"),
        (lambda labels: labels * 0 + 255, "No label map has a labelled pixel"),
        (lambda labels: labels[:-1], "4 label maps have another size than their images"),
    ],
)
def test_labels_that_mean_something_else_are_named(tmp_path, change, said):
    assert said in refusal("ade20k", rooms(tmp_path, change))


def test_classes_counted_from_zero_without_ignored_pixels(tmp_path):
    """Two classes as 0 and 1: read as ADE20K, one of them would be nothing, and the other the first."""
    root = rooms(tmp_path, lambda labels: (labels > 1).astype(int))
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tfloor\n")
    assert "seem to count classes from 0: 2, the last class, never occurs" in refusal("ade20k", root)


def test_one_odd_map_among_many_is_found(tmp_path):
    root = rooms(tmp_path)
    colours(LABELS, root / "annotations" / "validation" / "a1.png")
    said = refusal("ade20k", root)
    assert "1 files cannot be used: annotations/validation/a1.png (mode RGB" in said


def test_a_short_list_of_classes_is_found_before_a_name_is_missing(tmp_path):
    root = rooms(tmp_path)
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tbuilding, edifice\n")
    assert "4 label maps have labels above 2" in refusal("ade20k", root)
    (root / "objectInfo150.txt").write_text("Idx\tName\n")
    assert "list of classes is empty" in refusal("ade20k", root)


def test_a_list_of_classes_from_windows(tmp_path):
    root = rooms(tmp_path, lambda labels: np.minimum(labels, 2))
    (root / "objectInfo150.txt").write_bytes(b"\xef\xbb\xbfIdx\tName\r\n1\twall, other\r\n2\tfloor\r\n")
    assert inspected(verified("ade20k", root, "ade20k")).classes == ("wall", "floor")


@pytest.mark.parametrize("suffix", [".JPG", ".png", ".jpeg"])
def test_pictures_with_another_ending_are_named(tmp_path, suffix):
    said = refusal("ade20k", rooms(tmp_path, suffix=suffix))
    assert f"no images NAME.jpg, but 2 other files: a0{suffix}, a1{suffix}" in said


def video(folder, first, second):
    """Two frames in DAVIS's layout, for both splits."""
    for split in ("train", "val"):
        lists = folder / "ImageSets" / "2017"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(f"{split}\n")
        for part in ("JPEGImages", "Annotations"):
            (folder / part / "480p" / split).mkdir(parents=True)
        for number, labels in enumerate((first, second)):
            Image.new("RGB", (SIDE, SIDE), "grey").save(
                folder / "JPEGImages/480p" / split / f"{number:05d}.jpg"
            )
            palette(labels, folder / "Annotations/480p" / split / f"{number:05d}.png")
    return folder


def test_numbered_objects_pass(tmp_path):
    inspected(verified("davis", video(tmp_path, LABELS % 5, LABELS % 3), "davis"))


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (LABELS * 0, "2 sequences have no object in their first label map: "),
        ((LABELS > 0) * np.uint8(255), "2 sequences have labels 0 and 255 only, as the masks of DAVIS 2016"),
        (LABELS[:16] % 5, "label maps have another size than their frames"),
    ],
)
def test_masks_of_another_kind_are_named(tmp_path, first, said):
    assert said in refusal("davis", video(tmp_path, first, LABELS % 5))
