"""ImageNet-1K and its subsets: every form gives the same images; every damage is refused with where and fix."""

import gzip
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import (
    DEVKIT,
    class_tar,
    devkit_files,
    ground_truth,
    meta_mat,
    mini_imagenet,
    tar_bytes,
    train_tar,
    val_tar,
    write,
    write_class_folders,
    write_class_tars,
    write_kaggle,
    write_original,
    write_parquet,
    write_train_folders,
)
from reading import listed, refuse

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets import archives
from vitpipe.datasets.catalogue import class_order
from vitpipe.datasets.sources import wnid_tars
from vitpipe.datasets.sources.detect_format import find_source

MINI = mini_imagenet()
WRITERS = {
    "class folders": write_class_folders,
    "the original tars and devkit": write_original,
    "Kaggle's layout": write_kaggle,
}


@pytest.fixture(params=WRITERS)
def any_form(request, tmp_path):
    WRITERS[request.param](MINI, tmp_path / "imagenet")
    return tmp_path, request.param


@pytest.fixture
def original(tmp_path) -> Path:
    write_original(MINI, tmp_path / "imagenet")
    return tmp_path / "imagenet"


def test_every_form_gives_the_same_images_in_the_same_order(any_form):
    root, form = any_form
    source = find_source(root, "imagenet")
    assert source.form == form
    assert source.classes == MINI.wnids
    assert source.class_names == tuple(MINI.words(wnid) for wnid in MINI.wnids)
    assert source.notes == ()
    for split in ("train", "val"):
        assert listed(source, split) == MINI.expected(split)
        assert listed(source, split) == listed(source, split)


@settings(max_examples=8)
@given(seed=st.integers(0, 999), num_train=st.integers(1, 4), num_val=st.integers(1, 3))
def test_every_form_of_any_set_is_the_same(tmp_path_factory, seed, num_train, num_val):
    mini = mini_imagenet(num_train=num_train, num_val=num_val, seed=seed)
    for number, writer in enumerate(WRITERS.values()):
        root = tmp_path_factory.mktemp(str(number))
        writer(mini, root / "imagenet")
        source = find_source(root, "imagenet")
        assert {split: listed(source, split) for split in source.splits} == {
            split: mini.expected(split) for split in ("train", "val")
        }


def test_the_display_path_leads_to_the_image(any_form):
    root, form = any_form
    entries = list(find_source(root, "imagenet").entries("val"))
    top = {
        "class folders": "val/n01440764/",
        "the original tars and devkit": "ILSVRC2012_img_val.tar/",
        "Kaggle's layout": "ILSVRC/Data/CLS-LOC/val/",
    }[form]
    assert entries[0].shown == top + entries[0].name
    if form == "the original tars and devkit":
        first = next(find_source(root, "imagenet").entries("train"))
        assert first.shown == f"ILSVRC2012_img_train.tar/n01440764.tar/{first.name}"
    else:
        assert (root / "imagenet" / entries[0].shown).is_file()


def mixtures(folder):
    """Train and val in different states of unpacking."""
    write(folder / f"{DEVKIT}.tar.gz", gzip.compress(tar_bytes(devkit_files(MINI))))
    yield (
        "train: class folders, val: the original tar",
        lambda: (
            write_train_folders(MINI, folder / "train"),
            write(folder / "ILSVRC2012_img_val.tar", val_tar(MINI)),
        ),
    )
    yield (
        "train: one tar per wnid, val: flat images",
        lambda: (
            write_class_tars(MINI, folder / "train"),
            [write(folder / "val" / name, content) for name, _, content in MINI.val],
        ),
    )
    yield (
        "train: one tar per wnid, val: class folders",
        lambda: (
            write_class_tars(MINI, folder / "ILSVRC2012_img_train"),
            [write(folder / "val" / wnid / name, content) for name, wnid, content in MINI.val],
        ),
    )
    yield (
        "train: the original tar, val: flat images",
        lambda: (
            write(folder / "ILSVRC2012_img_train.tar", train_tar(MINI)),
            [write(folder / "ILSVRC2012_img_val" / name, content) for name, _, content in MINI.val],
            (folder / f"{DEVKIT}.tar.gz").unlink(),
            [write(folder / name, content) for name, content in devkit_files(MINI)],
        ),
    )


@pytest.mark.parametrize("number", range(4))
def test_partly_unpacked_sets_are_the_same_set(tmp_path, number):
    form, make = list(mixtures(tmp_path / "imagenet"))[number]
    make()
    source = find_source(tmp_path, "imagenet")
    assert source.form == form
    for split in source.splits:
        assert listed(source, split) == MINI.expected(split)


def test_reading_changes_nothing_and_lists_one_class_at_a_time(original, monkeypatch):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in original.rglob("*")}
    opened = []

    def listing(path, **span):
        opened.append(span)
        return archives.safe_tar_members(path, **span)

    source = find_source(original.parent, "imagenet")
    monkeypatch.setattr(wnid_tars, "safe_tar_members", listing)
    for position, entry in enumerate(source.entries("train")):
        assert len(opened) == 1 + position // 3
        assert pickle.loads(pickle.dumps(entry)) == entry
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in original.rglob("*")} == before


def test_a_class_folder_that_vanishes(tmp_path):
    write_class_folders(MINI, tmp_path / "imagenet")
    entries = find_source(tmp_path, "imagenet").entries("train")
    next(entries)
    shutil.rmtree(tmp_path / "imagenet" / "train" / MINI.wnids[1])
    with pytest.raises(DatasetError, match="can no longer be read"):
        list(entries)


def test_links_to_images_and_folders_are_followed(tmp_path):
    write_class_folders(MINI, tmp_path / "elsewhere")
    train = tmp_path / "imagenet" / "train"
    train.mkdir(parents=True)
    for folder in (tmp_path / "elsewhere" / "train").iterdir():
        (train / folder.name).mkdir()
        for image in folder.iterdir():
            (train / folder.name / image.name).symlink_to(image)
    (tmp_path / "imagenet" / "val").symlink_to(tmp_path / "elsewhere" / "val")
    source = find_source(tmp_path, "imagenet")
    assert [listed(source, split) for split in source.splits] == [
        MINI.expected("train"),
        MINI.expected("val"),
    ]


def test_folders_take_precedence_over_archives_with_a_note(original):
    write_class_folders(MINI, original)
    source = find_source(original.parent, "imagenet")
    assert source.form == "class folders"
    assert "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar" in source.notes[0]


def test_a_half_unpacked_folder_names_the_archive_that_could_be_read(original):
    write_class_folders(MINI, original)
    shutil.rmtree(original / "train" / MINI.wnids[2])
    error = refuse(original.parent)
    assert MINI.wnids[2] in error.what
    assert "ILSVRC2012_img_train.tar" in error.fix


# Damage


def test_no_devkit(original):
    (original / f"{DEVKIT}.tar.gz").unlink()
    error = refuse(original.parent)
    assert "classes of the validation images are missing" in error.what
    assert f"{DEVKIT}.tar.gz" in error.fix
    assert "LOC_val_solution.csv" in error.fix


def test_only_the_train_tar(original):
    (original / "ILSVRC2012_img_val.tar").unlink()
    error = refuse(original.parent)
    assert "validation images" in error.what
    assert f"ILSVRC2012_img_val.tar and {DEVKIT}.tar.gz" in error.fix


def test_no_train_tar(original):
    (original / "ILSVRC2012_img_train.tar").unlink()
    assert "put ILSVRC2012_img_train.tar into" in refuse(original.parent).fix


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", f"{DEVKIT}.tar.gz"])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.8])
def test_truncated_archives(original, name, kept):
    path = original / name
    content = path.read_bytes().rstrip(b"\0")  # a shorter end-of-archive padding is no damage
    path.write_bytes(content[: int(kept * len(content))])
    assert name in refuse(original.parent).where


def test_a_truncated_class_tar(tmp_path):
    folder = tmp_path / "imagenet"
    write_class_folders(MINI, folder)
    shutil.rmtree(folder / "train")
    write_class_tars(MINI, folder / "train")
    path = folder / "train" / f"{MINI.wnids[1]}.tar"
    path.write_bytes(path.read_bytes()[:1500])
    assert path.name in refuse(tmp_path).where


def test_an_empty_class_tar_is_found_before_packing(original):
    tars = [(f"{wnid}.tar", class_tar(MINI, wnid)) for wnid in MINI.wnids[:-1]]
    write(original / "ILSVRC2012_img_train.tar", tar_bytes([*tars, (f"{MINI.wnids[-1]}.tar", tar_bytes([]))]))
    with pytest.raises(DatasetError, match=r"'n02056570.tar' contains no images"):
        find_source(original.parent, "imagenet")


def test_a_class_tar_missing_or_unknown(original):
    tars = [(f"{wnid}.tar", class_tar(MINI, wnid)) for wnid in MINI.wnids[:-1]]
    write(original / "ILSVRC2012_img_train.tar", tar_bytes(tars))
    assert f"without training images: {MINI.wnids[-1]}" in refuse(original.parent).what
    tars += [(f"{name}.tar", class_tar(MINI, MINI.wnids[-1])) for name in (MINI.wnids[-1], "n09999999")]
    write(original / "ILSVRC2012_img_train.tar", tar_bytes(tars))
    assert "1 training class is unknown" in refuse(original.parent).what


def test_a_train_tar_that_is_something_else(original):
    write(original / "ILSVRC2012_img_train.tar", tar_bytes([("train/n01440764/a.JPEG", b"x")]))
    assert "one <wnid>.tar per class" in refuse(original.parent).what
    write(original / "ILSVRC2012_img_train.tar", gzip.compress(train_tar(MINI)))
    refuse(original.parent)


def test_a_malicious_train_tar(original):
    write(original / "ILSVRC2012_img_train.tar", tar_bytes([("../n01440764.tar", b"x")]))
    assert "n01440764.tar" in refuse(original.parent).what


def test_more_or_fewer_val_images_than_labels(original):
    images = [(name, content) for name, _, content in MINI.val]
    write(original / "ILSVRC2012_img_val.tar", tar_bytes(images[:-1]))
    error = refuse(original.parent)
    assert "labels of 10 images and 9 were found" in error.what
    assert "ILSVRC2012_val_00000010" in error.what
    write(original / "ILSVRC2012_img_val.tar", tar_bytes([*images, ("ILSVRC2012_val_00000011.JPEG", b"x")]))
    assert "1 image has no label (ILSVRC2012_val_00000011)" in refuse(original.parent).what


@pytest.mark.parametrize("label", ["0", "6", "1001", "-1", "one"])
def test_ground_truth_out_of_range(original, label):
    """6 is the inner node of the miniature's meta.mat."""
    lines = ground_truth(MINI).split()
    lines[3] = label
    files = dict(devkit_files(MINI))
    files[f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"] = "\n".join(lines).encode()
    write(original / f"{DEVKIT}.tar.gz", gzip.compress(tar_bytes(list(files.items()))))
    assert f"Line 4 of ILSVRC2012_validation_ground_truth.txt is '{label}'" in refuse(original.parent).what


# Explicit ids: meta.mat contains its time of writing, and pytest-xdist needs the same test ids in every
# worker.
@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 300, meta_mat(MINI)[:-40], meta_mat(MINI)[:200], None],
    ids=["empty", "no-matlab", "cut-late", "cut-early", "missing"],
)
def test_a_damaged_or_missing_meta_mat(original, content):
    files = {name: old if "meta" not in name else content for name, old in devkit_files(MINI)}
    files = [(name, old) for name, old in files.items() if old is not None]
    write(original / f"{DEVKIT}.tar.gz", gzip.compress(tar_bytes(files)))
    assert f"{DEVKIT}.tar.gz" in refuse(original.parent).where


def test_kaggles_list(tmp_path):
    folder = tmp_path / "imagenet"
    write_kaggle(MINI, folder)
    path = folder / "LOC_val_solution.csv"
    lines = path.read_text().splitlines()
    for damaged, word in (
        ([lines[0], *lines[2:]], "1 image has no label"),
        ([*lines, "ILSVRC2012_val_00000077,n01440764 1 2 3 4"], "1 image is missing"),
        ([*lines, lines[1]], "its second one"),
        ([*lines[:-1], lines[-1].split(",")[0] + ",n09999999 1 2 3 4"], "unknown"),
        ([*lines[:-1], lines[-1].split(",")[0]], "Line 11"),
        (lines[1:], "first line"),
        ([], "first line"),
    ):
        path.write_text("\n".join(damaged))
        error = refuse(tmp_path)
        assert word in error.what
    path.unlink()
    error = refuse(tmp_path)
    assert "10 images are directly in 'val'" in error.what
    assert "LOC_val_solution.csv" in error.fix


def test_kaggles_archive_must_be_unpacked(tmp_path):
    write(tmp_path / "imagenet" / "imagenet-object-localization-challenge.zip", b"x")
    assert "must be unpacked" in refuse(tmp_path).what


# Subsets

WANTED = {name: class_order(name) for name in ("imagenet100", "imagenet10")}
MANY = mini_imagenet(
    tuple(sorted({*WANTED["imagenet100"], *WANTED["imagenet10"], "n01440764", "n01443537", "n15075141"})),
    1,
    1,
)


def test_the_lists_of_the_subsets():
    assert [len(WANTED[name]) for name in ("imagenet100", "imagenet10")] == [100, 10]
    for wnids in WANTED.values():
        assert list(wnids) == sorted(set(wnids))
        assert set(wnids) <= set(class_order("imagenet"))


@pytest.mark.parametrize("form", WRITERS)
def test_subsets_of_every_form(tmp_path, form):
    WRITERS[form](MANY, tmp_path / "imagenet")
    for dataset, wnids in WANTED.items():
        source = find_source(tmp_path, dataset)
        assert (source.dataset, source.classes) == (dataset, wnids)
        assert source.class_names == tuple(MANY.words(wnid) for wnid in wnids)
        assert any("classes below imagenet/" in note for note in source.notes)
        for split in source.splits:
            assert listed(source, split) == MANY.expected(split, wnids)


def test_subsets_of_parquet(tmp_path):
    write_parquet(MANY, tmp_path / "imagenet")
    for dataset, wnids in WANTED.items():
        source = find_source(tmp_path, dataset)
        for split in source.splits:
            assert sorted(listed(source, split)) == sorted(MANY.expected(split, wnids))


def test_a_subset_opens_no_other_tar(tmp_path, monkeypatch):
    write_original(MANY, tmp_path / "imagenet")
    source = find_source(tmp_path, "imagenet10")
    opened = []

    def listing(path, **span):
        opened.append(span)
        return archives.safe_tar_members(path, **span)

    monkeypatch.setattr(wnid_tars, "safe_tar_members", listing)
    assert len(listed(source, "train")) == 10
    assert len(opened) == 10


def test_a_subset_in_a_folder_of_its_own(tmp_path):
    wnids = WANTED["imagenet10"]
    write_class_folders(mini_imagenet(wnids, 2, 1), tmp_path / "imagenet10")
    write_original(MANY, tmp_path / "imagenet")
    source = find_source(tmp_path, "imagenet10")
    assert (source.form, source.classes, source.root) == ("class folders", wnids, tmp_path / "imagenet10")
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "imagenet10" / split / wnids[4])
    error = refuse(tmp_path, "imagenet10")
    assert f"1 of the 10 classes of 'imagenet10' is missing: {wnids[4]}" in error.what
