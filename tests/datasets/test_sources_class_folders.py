"""Class folders of any set, including the embedded ones."""

import shutil

import pytest
from miniatures import write

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.sources import class_listing
from vitpipe.datasets.sources.detect_format import find_source


def refuse(root, dataset="imagenet") -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        find_source(root, dataset)
    assert caught.value.fix
    assert caught.value.where
    return caught.value


def test_the_embedded_sets(raw):
    source = find_source(raw, "imagenet")
    assert source.classes == tuple(f"n9990000{digit}" for digit in range(10))
    assert source.class_names[:2] == ("digit zero", "digit one")
    assert (source.form, source.splits, source.notes) == ("class folders", ("train", "val"), ())
    entries = list(source.entries("train"))
    assert len(entries) == 30
    assert entries[0].place.read() == (raw / "imagenet" / entries[0].shown).read_bytes()
    assert [(entry.label, entry.name) for entry in entries] == sorted((e.label, e.name) for e in entries)
    assert len(find_source(raw, "imagenet22k").classes) == 50


@pytest.mark.parametrize(
    "name", ["imagenet", "imagenet22k", "imagenet100", "cifar10", "svhn", "flowers102", "domainnet_sketch"]
)
def test_a_missing_or_empty_dataset_names_the_required_files(tmp_path, name):
    error = refuse(tmp_path, name)
    assert f"'{name}'" in error.what
    assert "data.sets" in error.fix
    write(tmp_path / name / "notes.txt", "hello")
    error = refuse(tmp_path, name)
    assert "notes.txt" in error.what
    assert "train/" in error.fix


def test_one_folder_too_deep(raw_copy):
    (raw_copy / "imagenet").rename(raw_copy / "inner")
    (raw_copy / "imagenet").mkdir()
    (raw_copy / "inner").rename(raw_copy / "imagenet" / "ILSVRC2012")
    assert "content of ILSVRC2012/ one folder up" in refuse(raw_copy).fix


def test_a_folder_without_permission(raw_copy, monkeypatch):
    def closed(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(class_listing, "class_folders_of", closed)
    error = refuse(raw_copy)
    assert "Permission denied" in error.what
    assert error.where.endswith("train")


def test_a_name_that_is_no_set(tmp_path):
    with pytest.raises(DatasetError, match="'coco' is not a set of images with classes"):
        find_source(tmp_path, "coco")


def test_a_flat_val_folder(raw_copy):
    val = raw_copy / "imagenet" / "val"
    for image in list(val.rglob("*.JPEG")):
        image.rename(val / image.name)
    for folder in val.iterdir():
        if folder.is_dir():
            folder.rmdir()
    error = refuse(raw_copy)
    assert "50 images are directly in 'val'" in error.what
    assert "ground_truth" in error.fix


def test_loose_images_beside_class_folders(raw_copy):
    write(raw_copy / "imagenet" / "train" / "stray.jpeg", b"x")
    assert "1 image is directly in 'train', not in class folders: stray.jpeg" in refuse(raw_copy).what


@pytest.mark.parametrize("name", ["imagenet", "imagenet22k", "cifar100"])
def test_no_classes(tmp_path, name):
    (tmp_path / name / "train").mkdir(parents=True)
    (tmp_path / name / "val").mkdir(parents=True)
    assert "no class folders" in refuse(tmp_path, name).what


@pytest.mark.parametrize("name", ["imagenet", "cifar10"])
def test_train_without_val(raw_copy, name):
    (raw_copy / "imagenet").rename(raw_copy / f"{name}_")
    (raw_copy / f"{name}_").rename(raw_copy / name)
    shutil.rmtree(raw_copy / name / "val")
    assert refuse(raw_copy, name).where.endswith(f"{name}/val")


def test_different_classes(raw_copy):
    (raw_copy / "imagenet" / "val" / "n99900003").rename(raw_copy / "imagenet" / "val" / "n99900042")
    assert "n99900003, n99900042" in refuse(raw_copy).what


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class(raw_copy, split):
    folder = raw_copy / "imagenet" / split / "n99900003"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".hidden").touch()
    assert "1 class folder is empty: n99900003" in refuse(raw_copy).what


def test_a_class_that_is_still_packed(raw_copy):
    folder = raw_copy / "imagenet" / "train" / "n99900003"
    shutil.rmtree(folder)
    write(folder.with_name("n99900003.tar"), b"x")
    assert "1 class is still packed: n99900003.tar" in refuse(raw_copy).what


def test_hidden_files_are_passed_over_and_others_are_not(raw_copy):
    folder = raw_copy / "imagenet" / "train" / "n99900000"
    write(folder / "._x.JPEG", b"x")
    write(folder / "thumbs.txt", b"x")
    names = [entry.name for entry in find_source(raw_copy, "imagenet").entries("train")]
    assert "thumbs.txt" in names
    assert not [name for name in names if name.startswith(".")]


def test_classes_named_by_numbers_sort_as_text_and_a_note_says_so(tmp_path):
    for label in range(12):
        for split in ("train", "val"):
            write(tmp_path / "flowers102" / split / str(label) / "a.jpg", str(label))
    source = find_source(tmp_path, "flowers102")
    assert source.classes[:4] == ("0", "1", "10", "11")
    assert "sorted as text" in source.notes[0]
