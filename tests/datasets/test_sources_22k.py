"""ImageNet-22K: tars by wnid, a tar of them, and ImageNet-21K-P."""

import gzip

import pytest
from miniatures import (
    class_tar,
    jpeg,
    mini_imagenet,
    tar_bytes,
    train_tar,
    write,
    write_class_folders,
    write_class_tars,
    write_synset_mapping,
    write_train_folders,
)
from reading import listed, refuse

from vitpipe.datasets.sources.class_listing import HELD_OUT_ONE_IN, is_held_out
from vitpipe.datasets.sources.detect_format import find_source

WNIDS = ("n00004475", "n00005787", "n02056570", "n99999999")
MINI = mini_imagenet(WNIDS, num_train=150)
FORMS = {
    "class folders": lambda folder: write_train_folders(MINI, folder / "train"),
    "class folders in winter21_whole/": lambda folder: write_train_folders(MINI, folder / "winter21_whole"),
    "one tar per wnid in winter21_whole/": lambda folder: write_class_tars(MINI, folder / "winter21_whole"),
    "one tar per wnid in fall11/": lambda folder: write_class_tars(MINI, folder / "fall11"),
    "one tar per wnid in imagenet22k/": lambda folder: write_class_tars(MINI, folder),
    "fall11_whole.tar, a tar of tars": lambda folder: write(folder / "fall11_whole.tar", train_tar(MINI)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_holds_out_the_same_share(tmp_path, form):
    FORMS[form](tmp_path / "imagenet22k")
    write_synset_mapping(MINI, tmp_path / "imagenet22k")
    source = find_source(tmp_path, "imagenet22k")
    assert (source.form, source.classes) == (form, WNIDS)
    assert source.class_names == tuple(MINI.words(wnid) for wnid in WNIDS)
    assert "kept out of training" in source.notes[-1]
    everything = MINI.expected("train")
    train, val = (listed(source, split) for split in ("train", "val"))
    assert val == [image for image in everything if is_held_out(image[0])]
    assert train == [image for image in everything if not is_held_out(image[0])]
    assert val


def test_the_held_out_share_is_fixed():
    names = [f"n00004475_{number}.JPEG" for number in range(20_000)]
    held_out = [name for name in names if is_held_out(name)]
    assert 0.8 < len(held_out) * HELD_OUT_ONE_IN / len(names) < 1.2
    # The rule is part of what a published number means.
    assert held_out[:3] == ["n00004475_68.JPEG", "n00004475_87.JPEG", "n00004475_234.JPEG"]


@pytest.mark.parametrize("above", ["", "imagenet21k_resized/"])
def test_imagenet21k_p(tmp_path, above):
    folder = tmp_path / "imagenet22k"
    write_train_folders(MINI, folder / f"{above}imagenet21k_train")
    for name, wnid, content in MINI.val:
        write(folder / f"{above}imagenet21k_val" / wnid / name, content)
    write(folder / f"{above}imagenet21k_small_classes" / "n00000001" / "n00000001_1.JPEG", jpeg(1))
    source = find_source(tmp_path, "imagenet22k")
    assert source.notes == ()
    for split in source.splits:
        assert listed(source, split) == MINI.expected(split)


def test_train_and_val_folders(tmp_path):
    write_class_folders(MINI, tmp_path / "imagenet22k")
    source = find_source(tmp_path, "imagenet22k")
    for split in source.splits:
        assert listed(source, split) == MINI.expected(split)


def test_the_compressed_archive_must_be_unpacked(tmp_path):
    write(tmp_path / "imagenet22k" / "winter21_whole.tar.gz", gzip.compress(train_tar(MINI)))
    error = refuse(tmp_path, "imagenet22k")
    assert "winter21_whole.tar.gz must be unpacked first" in error.what
    assert "tar -xzf winter21_whole.tar.gz" in error.fix


@pytest.mark.parametrize("rest", ["n00005787.tar.part", "n00005787.tar.aria2", "n00005787.tar-1"])
def test_unfinished_downloads(tmp_path, rest):
    folder = tmp_path / "imagenet22k" / "winter21_whole"
    write_class_tars(MINI, folder)
    write(folder / rest, b"x")
    assert f"1 download looks unfinished: {rest}" in refuse(tmp_path, "imagenet22k").what


def test_an_empty_or_truncated_class_tar(tmp_path):
    folder = tmp_path / "imagenet22k" / "winter21_whole"
    write_class_tars(MINI, folder)
    for content, word in (
        (tar_bytes([]), "contains no images"),
        (b"", ""),
        (class_tar(MINI, WNIDS[1])[:99_000], ""),
    ):
        write(folder / "n00005787.tar", content)
        error = refuse(tmp_path, "imagenet22k")
        assert word in error.what
        assert "n00005787" in error.what + error.where


def test_a_class_twice(tmp_path):
    twice = [("a/n00004475.tar", class_tar(MINI, WNIDS[0])), ("b/n00004475.tar", class_tar(MINI, WNIDS[0]))]
    write(tmp_path / "imagenet22k" / "fall11_whole.tar", tar_bytes(twice))
    assert "two 'n00004475.tar'" in refuse(tmp_path, "imagenet22k").what


def test_an_empty_class_folder(tmp_path):
    write_train_folders(MINI, tmp_path / "imagenet22k" / "fall11")
    (tmp_path / "imagenet22k" / "fall11" / "n00000001").mkdir()
    assert "1 class folder is empty: n00000001" in refuse(tmp_path, "imagenet22k").what


def write_pair_of_tars(folder):
    write_class_tars(MINI, folder / "imagenet21k_train")
    for wnid in WNIDS:
        images = [(f"{wnid}/{name}", content) for name, own, content in MINI.val if own == wnid]
        write(folder / "imagenet21k_val" / f"{wnid}.tar", tar_bytes(images[::-1]))


def test_the_processed_release_as_tars_keeps_its_own_val(tmp_path):
    write_pair_of_tars(tmp_path / "imagenet22k")
    source = find_source(tmp_path, "imagenet22k")
    assert source.form == "one tar per wnid in imagenet21k_train/ and imagenet21k_val/"
    assert source.classes == WNIDS
    assert source.notes == ()
    assert listed(source, "train") == MINI.expected("train")
    assert listed(source, "val") == MINI.expected("val")


def test_the_processed_release_with_a_class_missing_in_val(tmp_path):
    write_pair_of_tars(tmp_path / "imagenet22k")
    (tmp_path / "imagenet22k" / "imagenet21k_val" / f"{WNIDS[1]}.tar").unlink()
    assert f"different classes, for example {WNIDS[1]}" in refuse(tmp_path, "imagenet22k").what
