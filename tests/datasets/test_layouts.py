"""COCO, ADE20K and DAVIS from folders and from their original archives, intact and damaged."""

import json
import re
import shutil
import zipfile
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.catalogue import class_names
from vitpipe.datasets.layouts import layout_of, verified
from vitpipe.datasets.layouts.ade20k import verify_ade20k
from vitpipe.datasets.layouts.coco import verify_coco
from vitpipe.datasets.layouts.davis import verify_davis
from vitpipe.datasets.layouts.file_tree import FolderTree, LayeredTree, ZipTree, evenly_spaced

ORIGINALS = {
    "coco": {
        "train2017.zip": ("train2017", ""),
        "val2017.zip": ("val2017", ""),
        "annotations_trainval2017.zip": ("annotations", ""),
    },
    "ade20k": {"ADEChallengeData2016.zip": (".", "ADEChallengeData2016/")},
    "davis": {"DAVIS-2017-trainval-480p.zip": (".", "DAVIS/")},
}


def verify(name, root):
    """The set of this name in its own layout."""
    return verified(name, root, name)


def refuse(check, *arguments) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        check(*arguments)
    assert caught.value.fix
    assert caught.value.where
    return caught.value


def to_archives(root, name) -> None:
    """Turn a folder into the archives that the set is published as."""
    for file, (part, prefix) in ORIGINALS[name].items():
        with zipfile.ZipFile(root.parent / file, "w") as archive:
            for path in sorted((root / part).rglob("*")):
                archive.write(path, prefix + str(path.relative_to(root)))
            archive.writestr("__MACOSX/._" + file, b"litter")  # as the macOS Finder adds it
    shutil.rmtree(root)
    root.mkdir()
    for file in ORIGINALS[name]:
        (root.parent / file).rename(root / file)


@pytest.fixture
def zipped(raw_copy):
    for name in ORIGINALS:
        to_archives(raw_copy / name, name)
    return raw_copy


def test_embedded_layouts_pass(raw):
    layouts = {name: verify(name, raw / name) for name in ("coco", "ade20k", "davis")}
    assert layouts["coco"].counts["train_images"] == layouts["ade20k"].counts["train_images"] == 6
    assert layouts["davis"].counts == {
        "train_sequences": 1, "train_images": 3, "val_sequences": 1, "val_images": 3,
    }  # fmt: skip
    assert all(layout.is_folder and layout.form == "folders" for layout in layouts.values())


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_original_archives_are_the_same_set(raw, zipped, name):
    folder, archives = verify(name, raw / name), verify(name, zipped / name)
    assert archives.files == folder.files
    assert (archives.classes, archives.counts) == (folder.classes, folder.counts)
    assert not archives.is_folder
    assert archives.form == f"archives ({', '.join(ORIGINALS[name])})"
    for file in folder.files:
        content = folder.tree.read(file)
        assert archives.tree.read(file) == content
        assert archives.tree.size_bytes(file) == len(content) == folder.tree.size_bytes(file)
    assert layout_of(name).look_into(archives, None) == layout_of(name).look_into(folder, None)
    assert layout_of(name).look_into(archives, None).problems == ()


def test_partly_unpacked(raw, zipped):
    shutil.copytree(raw / "coco" / "val2017", zipped / "coco" / "val2017")
    layout = verify_coco(zipped / "coco")
    assert layout.form == "archives (train2017.zip, annotations_trainval2017.zip)"
    assert layout.files == verify_coco(raw / "coco").files
    victim = next((zipped / "coco" / "val2017").iterdir())
    victim.unlink()
    error = refuse(verify_coco, zipped / "coco")
    assert victim.name in error.what
    assert "val2017.zip" in error.fix


def test_everything_unpacked_beside_its_archives_is_a_folder(raw_copy, raw):
    to_archives(raw_copy / "davis", "davis")
    shutil.copytree(raw / "davis", raw_copy / "davis", dirs_exist_ok=True)
    assert verify_davis(raw_copy / "davis").is_folder


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_truncated_archive(zipped, name):
    path = zipped / name / next(iter(ORIGINALS[name]))
    path.write_bytes(path.read_bytes()[:-50])
    assert "damaged or truncated" in refuse(partial(verify, name), zipped / name).what


def test_an_archive_of_something_else(zipped):
    with zipfile.ZipFile(zipped / "ade20k" / "ADEChallengeData2016.zip", "w") as archive:
        archive.writestr("README", b"")
    assert refuse(verify_ade20k, zipped / "ade20k").what == "A folder of the dataset 'ade20k' is missing"


def test_a_damaged_member(zipped):
    path = zipped / "coco" / "train2017.zip"
    content = bytearray(path.read_bytes())
    content[300] ^= 255  # in the first picture, which is stored
    path.write_bytes(content)
    layout = verify_coco(zipped / "coco")
    first = next(file for file in layout.files if file.startswith("train2017"))
    error = refuse(layout.tree.read, first)
    assert "cannot be read" in error.what
    assert error.where == f"{path}: {first}"


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_missing_dataset_names_the_required_files(tmp_path, name):
    error = refuse(partial(verify, name), tmp_path / name)
    assert f"'{name}'" in error.what
    assert "data.sets" in error.fix
    assert all(file in error.fix for file in ORIGINALS[name])


def test_coco_annotations_missing_or_damaged(raw_copy):
    path = raw_copy / "coco" / "annotations" / "instances_val2017.json"
    whole = path.read_text()
    for text in (
        whole[:-100],
        "[" * 100_000,
        "[]",
        whole.replace('"file_name": "', '"file_name": 1, "x": "'),
    ):
        path.write_text(text)
        assert re.search("damaged|without a file_name", refuse(verify_coco, raw_copy / "coco").what)
    path.write_text("{}")
    assert "images" in refuse(verify_coco, raw_copy / "coco").what
    path.unlink()
    error = refuse(verify_coco, raw_copy / "coco")
    assert "missing" in error.what
    assert "annotations_trainval2017.zip" in error.fix


def test_missing_coco_images(raw_copy):
    victim = next((raw_copy / "coco" / "train2017").iterdir())
    victim.unlink()
    assert victim.name in refuse(verify_coco, raw_copy / "coco").what
    shutil.rmtree(raw_copy / "coco" / "train2017")
    assert refuse(verify_coco, raw_copy / "coco").where.endswith("train2017")


def test_coco_image_names_that_lead_out_of_the_folder(raw_copy):
    path = raw_copy / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "../../ade20k/objectInfo150.txt"
    path.write_text(json.dumps(content))
    assert "1 file is missing" in refuse(verify_coco, raw_copy / "coco").what


@pytest.mark.parametrize(("key", "word"), [("image_id", "images"), ("category_id", "categories")])
def test_coco_annotations_of_something_unknown(raw_copy, key, word):
    path = raw_copy / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0][key] = 999_999
    path.write_text(json.dumps(content))
    assert (
        f"{word} that are not listed (1), for example 999999" in refuse(verify_coco, raw_copy / "coco").what
    )


def test_coco_splits_with_different_categories(raw_copy):
    path = raw_copy / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "person"
    path.write_text(json.dumps(content))
    assert "different categories" in refuse(verify_coco, raw_copy / "coco").what


def test_coco_images_of_another_size(raw_copy):
    root = raw_copy / "coco"
    first, second = sorted((root / "train2017").iterdir())[:2]
    with Image.open(first) as picture:
        picture.resize((32, 20)).save(first)
    second.write_bytes(b"no picture")
    look = layout_of("coco").look_into(verify_coco(root), None)
    assert look.num_looked == 10
    broken, wrong = look.problems
    assert "1 image cannot be decoded" in broken.what
    assert second.name in broken.what
    assert f"{first.name} (32x20 instead of 64x48)" in wrong.what
    assert "annotations" in wrong.where
    assert (
        layout_of("coco").look_into(verify_coco(root), 4).num_looked == 3
    )  # 4 of 10, dealt to 6 and 4 images


def test_ade20k_pictures_and_label_maps_must_pair(raw_copy):
    root = raw_copy / "ade20k"
    (root / "annotations" / "validation" / "ADE_val_00000002.png").unlink()
    assert "ADE_val_00000002.png" in refuse(verify_ade20k, root).what
    (root / "images" / "validation" / "ADE_val_00000002.jpg").unlink()
    (root / "images" / "training" / "ADE_train_00000001.jpg").unlink()
    assert "ADE_train_00000001.jpg" in refuse(verify_ade20k, root).what


@pytest.mark.parametrize(("name", "inner"), [("ade20k", "ADEChallengeData2016"), ("davis", "DAVIS")])
def test_unpacked_with_the_folder_of_the_archive(raw_copy, name, inner):
    before = verify(name, raw_copy / name)
    (raw_copy / name).rename(raw_copy / "inner")
    (raw_copy / name).mkdir()
    (raw_copy / "inner").rename(raw_copy / name / inner)
    layout = verify(name, raw_copy / name)
    assert (layout.root, layout.files) == (raw_copy / name / inner, before.files)
    assert layout.is_folder


def test_ade20k_without_its_parts(tmp_path):
    (tmp_path / "ade20k").mkdir()
    assert "ADEChallengeData2016.zip" in refuse(verify_ade20k, tmp_path / "ade20k").fix


def test_ade20k_list_of_names(raw_copy):
    path = raw_copy / "ade20k" / "objectInfo150.txt"
    path.write_bytes(b"Idx\tName\n1\t\xff\xfe")
    assert "list of classes is damaged" in refuse(verify_ade20k, raw_copy / "ade20k").what
    path.unlink()
    assert verify_ade20k(raw_copy / "ade20k").classes == class_names("ade20k")


def test_ade20k_label_maps_that_do_not_fit(raw_copy):
    root = raw_copy / "ade20k"
    labels = sorted((root / "annotations" / "training").iterdir())
    Image.fromarray(np.full((48, 64), 200, np.uint8)).save(labels[0])
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(labels[1])
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(labels[2])
    (root / "images" / "training" / labels[3].with_suffix(".jpg").name).write_bytes(b"")
    look = layout_of("ade20k").look_into(verify_ade20k(root), None)
    assert look.num_looked == 10
    broken, wrong, high = (problem.what for problem in look.problems)
    assert broken.startswith("2 files cannot be used")
    assert f"{labels[2].name} (mode RGB" in broken
    assert f"{labels[1].name} (64x32 instead of 64x48)" in wrong
    assert f"{labels[0].name} (200)" in high


def test_davis_lists_and_sequences(raw_copy):
    root = raw_copy / "davis"
    shutil.rmtree(root / "Annotations" / "480p" / "digits-val-00")
    assert "digits-val-00" in refuse(verify_davis, root).where
    (root / "JPEGImages" / "480p" / "digits-train-00" / "00003.jpg").touch()
    assert "00003.png" in refuse(verify_davis, root).what
    (root / "ImageSets" / "2017" / "train.txt").unlink()
    assert "list of sequences" in refuse(verify_davis, root).what


def test_davis_lists_that_name_nothing_or_a_sequence_twice(raw_copy):
    listing = raw_copy / "davis" / "ImageSets" / "2017" / "val.txt"
    names = listing.read_text()
    listing.write_text(names + names)
    assert "more than once" in refuse(verify_davis, raw_copy / "davis").what
    listing.write_text("")
    assert "names no sequence" in refuse(verify_davis, raw_copy / "davis").what


def test_missing_davis_frames(raw_copy):
    root, name = raw_copy / "davis", "digits-train-00"
    frames, labels = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
    (frames / "00001.jpg").unlink()
    assert "00001.jpg" in refuse(verify_davis, root).what
    (labels / "00001.png").unlink()
    assert "Frame numbers have gaps: after 00000" in refuse(verify_davis, root).what
    for folder in (frames, labels):
        shutil.rmtree(folder)
        folder.mkdir()
    assert "no frames" in refuse(verify_davis, root).what


def test_a_davis_list_that_leads_elsewhere(raw_copy):
    (raw_copy / "davis" / "ImageSets" / "2017" / "val.txt").write_text("../480p/digits-val-00\n")
    assert "not the name of a sequence" in refuse(verify_davis, raw_copy / "davis").what


def test_davis_sizes(raw_copy):
    root = raw_copy / "davis"
    frames, labels = (root / part / "480p" / "digits-val-00" for part in ("JPEGImages", "Annotations"))
    Image.new("RGB", (32, 32)).save(frames / "00001.jpg")
    Image.new("P", (32, 32)).save(labels / "00001.png")
    Image.new("P", (32, 64)).save(labels / "00002.png")
    (labels / "00000.png").write_bytes(b"\x89PNG")
    look = layout_of("davis").look_into(verify_davis(root), None)
    broken, wrong, odd = (problem.what for problem in look.problems)
    assert look.num_looked == 6
    assert "00000.png" in broken
    assert "00002.png (32x64 instead of 64x36)" in wrong
    assert "00001.jpg" in odd


def test_files_that_no_list_names_are_noted(raw_copy):
    (raw_copy / "coco" / "val2017" / "zebra.jpg").touch()
    (raw_copy / "davis" / "JPEGImages" / "480p" / "zebra").mkdir()
    coco, davis = verify_coco(raw_copy / "coco"), verify_davis(raw_copy / "davis")
    assert coco.notes == ("1 file of val2017/ not in the annotations: zebra.jpg",)
    assert davis.notes == ("1 sequence is not listed: zebra",)
    assert not any("zebra" in name for name in coco.files + davis.files)


def test_layers(tmp_path, raw):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("top/a/1.txt", b"zipped")
        archive.writestr("top/b/2.txt", b"two")
        archive.writestr("top/.hidden/3.txt", b"")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "1.txt").write_bytes(b"unpacked")
    tree = LayeredTree([FolderTree(tmp_path / "folder"), ZipTree([tmp_path / "a.zip"], "top/")])
    assert tree.names("a") == ["1.txt"]
    assert tree.names("b", ".txt") == ["2.txt"]
    assert tree.names("b", ".jpg") == tree.names("c") == []
    assert [tree.read("a/1.txt"), tree.read("b/2.txt")] == [b"unpacked", b"two"]
    assert tree.is_dir("b")
    assert not tree.is_dir("top")
    assert not tree.is_file("a")
    assert tree.where("b/2.txt") == f"{tmp_path / 'a.zip'}: top/b/2.txt"


@given(st.lists(st.integers(), unique=True, max_size=50).map(sorted), st.integers(1, 60))
def test_an_evenly_spaced_sample(names, number):
    sample = evenly_spaced(names, number)
    assert len(sample) == min(number, len(names)) == len(set(sample))
    assert sample == sorted(sample)
    assert sample[:1] == names[:1]
    assert evenly_spaced(names, None) == names
