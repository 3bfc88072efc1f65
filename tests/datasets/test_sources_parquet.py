"""Parquet files in the format of the Hugging Face hub."""

import numpy as np
import pytest
from miniatures import (
    CIFAR_NAMES,
    jpeg,
    mini_imagenet,
    write,
    write_class_folders,
    write_parquet,
    write_parquet_file,
)
from reading import listed, refuse

from vitpipe.datasets.catalogue import class_order
from vitpipe.datasets.sources.detect_format import find_source

MINI = mini_imagenet()
VAL = "data/validation-00000-of-00001.parquet"


@pytest.fixture
def folder(tmp_path):
    write_parquet(MINI, tmp_path / "imagenet")
    return tmp_path / "imagenet"


def test_the_same_images_as_from_folders(folder):
    source = find_source(folder.parent, "imagenet")
    assert (source.form, source.classes) == ("Hugging Face parquet", MINI.wnids)
    assert source.class_names == tuple(MINI.words(wnid) for wnid in MINI.wnids)
    assert "order of the parquet files" in source.notes[0]
    for split in source.splits:
        assert sorted(listed(source, split)) == sorted(MINI.expected(split))
        assert listed(source, split) == listed(source, split)
    assert listed(source, "train") != MINI.expected("train")
    first = next(source.entries("val"))
    assert first.shown == f"{VAL}/{first.name}"


def test_folders_take_precedence_with_a_note(folder):
    write_class_folders(MINI, folder)
    source = find_source(folder.parent, "imagenet")
    assert source.form == "class folders"
    assert "parquet" in source.notes[-1]


def test_without_paths_the_schema_names_the_classes(tmp_path):
    write_parquet(MINI, tmp_path / "imagenet", with_paths=False)
    source = find_source(tmp_path, "imagenet")
    assert source.classes == tuple(MINI.words(wnid) for wnid in MINI.wnids)
    entries = listed(source, "train")
    assert [name for name, _, _ in entries[:2]] == ["train_00000000.jpg", "train_00000001.jpg"]
    assert sorted(entry[1:] for entry in entries) == sorted(e[1:] for e in MINI.expected("train"))
    assert "'imagenet100' are missing" in refuse(tmp_path, "imagenet100").what


def test_the_whole_set_without_paths_has_the_standard_classes(tmp_path):
    rows = [(None, label, b"x") for label in range(1000)]
    for name in ("train", "validation"):
        write_parquet_file(tmp_path / "imagenet" / "data" / f"{name}-00000-of-00001.parquet", rows)
    source = find_source(tmp_path, "imagenet")
    assert source.classes == class_order("imagenet")
    assert "standard list" in source.notes[1]
    assert {entry.label for entry in find_source(tmp_path, "imagenet100").entries("val")} == set(range(100))


def test_the_test_set_of_imagenet_is_not_used_as_val(folder):
    (folder / VAL).rename(folder / "data" / "test-00000-of-00001.parquet")
    assert "no validation-*.parquet" in refuse(folder.parent).what


def test_missing_files(folder):
    (folder / "data" / "train-00001-of-00002.parquet").unlink()
    assert "1 file found, 2 expected; missing numbers: 1" in refuse(folder.parent).what


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_files(folder, kept):
    path = folder / VAL
    content = path.read_bytes()
    write(path, content[: int(kept * len(content))])
    assert "damaged" in refuse(folder.parent).what


def test_damage_inside(folder):
    path = folder / VAL
    content = bytearray(path.read_bytes())
    content[50:1500] = bytes(1450)
    write(path, bytes(content))
    assert refuse(folder.parent).where.endswith(VAL)


def val_rows():
    return [(f"{name[:-5]}_{wnid}.JPEG", MINI.wnids.index(wnid), content) for name, wnid, content in MINI.val]


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (("n01440764_1.JPEG", 3, b"x"), "and the wnid n01440764, but in other rows"),
        (("n09999999_1.JPEG", 3, b"x"), "and the wnid n09999999, but in other rows"),
        (("ILSVRC2012_val_00000099_n01440764.JPEG", 2, b"x"), "and the wnid n01440764"),
        ((None, 5, b"x"), "has the label 5; the schema has 5 classes"),
        ((None, -1, b"x"), "has the label -1"),
        ((None, None, b"x"), "has the label None"),
        (("n01440764_1.JPEG", 0, None), "has no bytes"),
    ],
)
def test_impossible_labels(folder, row, word):
    # Column and class names are read from the first file only, so those of this one do not matter.
    write_parquet_file(folder / VAL, [*val_rows(), row], names=["?"] * 5)
    assert word in refuse(folder.parent).what


def test_labels_in_another_order_than_the_wnids(tmp_path):
    rows = [(f"{wnid}_1.JPEG", 4 - label, b"x") for label, wnid in enumerate(MINI.wnids)]
    for name in ("train", "val"):
        write_parquet_file(tmp_path / "imagenet" / "data" / f"{name}-00000-of-00001.parquet", rows)
    assert "sorted wnids" in refuse(tmp_path).what


def test_columns_of_something_else(folder):
    write_parquet_file(folder / "data" / "train-00000-of-00002.parquet", val_rows(), label="caption_id")
    assert "The columns are image, caption_id" in refuse(folder.parent).what


@pytest.mark.parametrize(
    ("dataset", "place", "image", "label", "names"),
    [
        ("cifar10", "plain_text", "img", "label", CIFAR_NAMES),
        ("cifar100", "cifar100", "img", "fine_label", [f"fine_{number}" for number in range(100)]),
        ("svhn", "cropped_digits", "image", "label", [str(digit) for digit in range(10)]),
    ],
)
def test_the_small_sets(tmp_path, dataset, place, image, label, names):
    """Their test set is val; images are PNGs without names."""
    for split in ("train", "test"):
        labels = np.random.default_rng(len(split)).integers(0, len(names), 5).tolist()
        rows = [(None, number, jpeg(number)) for number in labels]
        path = tmp_path / dataset / place / f"{split}-00000-of-00001.parquet"
        write_parquet_file(path, rows, names=names, image=image, label=label)
    source = find_source(tmp_path, dataset)
    assert source.classes == source.class_names == tuple(names)
    assert listed(source, "val") == [
        (f"val_{position:08d}.jpg", number, jpeg(number)) for position, number in enumerate(labels)
    ]
