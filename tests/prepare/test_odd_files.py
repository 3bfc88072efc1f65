"""Files of the wild among images: nothing hangs, nothing is lost for its name, no run differs from another."""

import csv
import os

import pytest
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.data.manifest import FINDINGS
from vitpipe.datasets.sources.class_folders import read_class_folders
from vitpipe.prepare.pack import PackOptions, Quarantine, pack


@pytest.fixture
def folder(tmp_path):
    """A set of two classes with two pictures each, of equal names."""
    for split in ("train", "val"):
        for key in ("a", "b"):
            (tmp_path / "set" / split / key).mkdir(parents=True)
            for number in range(2):
                Image.effect_noise((40, 30), 50).convert("RGB").save(
                    tmp_path / "set" / split / key / f"{number}.jpg"
                )
    return tmp_path / "set"


def packed(folder, limit=0):
    out = folder.parent / "out"
    source = read_class_folders(folder, "own")
    return pack(
        source, out, options=PackOptions(1 << 24), quarantine=Quarantine(limit), scratch=folder.parent / "s"
    )


def findings(folder):
    with (folder.parent / "out" / FINDINGS).open(newline="", encoding="utf-8") as file:
        return {(row["file"], row["finding"], row["treatment"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", ["Thumbs.db", "readme.TXT", "drawing.svg", "labels.csv", "desktop.ini"])
def test_what_is_no_picture_by_its_kind_is_left_out_and_not_counted_as_damaged(folder, name):
    (folder / "train" / "a" / name).write_bytes(b"<svg/>")
    manifest = packed(folder)
    assert manifest.splits["train"].num_images == 4
    assert findings(folder) == {(f"train/a/{name}", "no picture", "left out")}
    assert manifest.findings == {"no picture": 1}


@pytest.mark.parametrize("name", ["noextension", "photo.JPG", "photo.v2", os.fsdecode(b"caf\xe9.jpg")])
def test_a_picture_counts_whatever_its_name(folder, name):
    (folder / "train" / "a" / "0.jpg").rename(folder / "train" / "a" / name)
    assert packed(folder).splits["train"].images_per_class == (2, 2)


def test_a_named_pipe_does_not_hang(folder):
    os.mkfifo(folder / "train" / "a" / "pipe.jpg")
    with pytest.raises(
        DatasetError, match=r"1 image is unusable.*pipe\.jpg \(cannot be read: not a regular file\)"
    ):
        packed(folder)
    assert packed(folder, limit=1).splits["train"].num_images == 4


def test_a_class_with_other_files_only_is_empty(folder):
    for split in ("train", "val"):
        (folder / split / "c").mkdir()
        (folder / split / "c" / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(DatasetError, match="1 class folder is empty: c"):
        packed(folder)


def test_class_folders_whose_names_are_not_text_are_named(folder):
    for split in ("train", "val"):
        (folder / split / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(DatasetError, match="1 class folder has a name not in UTF-8") as refused:
        packed(folder)
    str(refused.value).encode()  # the message itself can be printed


def test_class_names_that_would_be_markup_are_kept(folder):
    for split in ("train", "val"):
        (folder / split / "a").rename(folder / split / "cost $^{_$ <b>|日本")
    manifest = packed(folder)
    assert manifest.classes == ("b", "cost $^{_$ <b>|日本")
