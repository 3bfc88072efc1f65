"""CIFAR, SVHN, Flowers-102 and DomainNet in their original files."""

import gzip
import io
import os
import pickle
import shutil
import zipfile
import zlib

import numpy as np
import pytest
from miniatures import (
    CIFAR_NAMES,
    cifar10_files,
    cifar100_files,
    jpeg,
    mat_bytes,
    python2_pickle,
    tar_bytes,
    write,
    write_cifar,
    write_domain,
    write_flowers,
    write_svhn,
)
from PIL import Image
from reading import listed, refuse

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.sources import matlab
from vitpipe.datasets.sources.detect_format import find_source
from vitpipe.datasets.sources.pickles import load_pickle


def pixels(entry) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(entry.place.read())))


# CIFAR

CIFAR = {
    "cifar10": ("cifar-10-batches-py", cifar10_files, [f"data_batch_{n}" for n in range(1, 6)], "test_batch"),
    "cifar100": ("cifar-100-python", cifar100_files, ["train"], "test"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dataset", CIFAR)
def test_cifar(tmp_path, dataset, packed):
    name, make, train, test = CIFAR[dataset]
    files = make()
    write_cifar(files, tmp_path / dataset, name, packed=packed)
    source = find_source(tmp_path, dataset)
    assert source.classes == source.class_names
    assert source.classes == (
        CIFAR_NAMES if dataset == "cifar10" else tuple(files["meta"]["fine_label_names"])
    )
    key = "labels" if dataset == "cifar10" else "fine_labels"
    for split, batches in (("train", train), ("val", [test])):
        entries = list(source.entries(split))
        assert [e.name for e in entries] == [n for batch in batches for n in files[batch]["filenames"]]
        assert [e.label for e in entries] == [n for batch in batches for n in files[batch][key]]
        rows = np.concatenate([files[batch]["data"] for batch in batches])
        for entry, row in zip(entries, rows, strict=True):
            # The first 1024 numbers are the red plane, row by row.
            assert (pixels(entry) == row.reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert entries[0].shown.endswith(f"/{test}/{entries[0].name}")


def test_cifar_without_the_folder_around_it(tmp_path):
    write_cifar(cifar10_files(), tmp_path, "cifar-10-batches-py", packed=False)
    (tmp_path / "cifar-10-batches-py").rename(tmp_path / "cifar10")
    assert len(list(find_source(tmp_path, "cifar10").entries("train"))) == 20


def damage_rows(batch):
    batch["data"] = batch["data"][:-1]


def damage_label(batch):
    batch["labels"][1] = 10


def damage_type(batch):
    batch["data"] = batch["data"].astype(np.float32)


def damage_names(batch):
    del batch["filenames"]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_rows, "do not match"),
        (damage_label, "Row 1 has the label 10"),
        (damage_type, "not of bytes"),
        (damage_names, "filenames"),
    ],
)
def test_cifar_batches_that_do_not_fit(tmp_path, damage, word):
    files = cifar10_files()
    damage(files["data_batch_3"])
    write_cifar(files, tmp_path / "cifar10", "cifar-10-batches-py", packed=False)
    error = refuse(tmp_path, "cifar10")
    assert word in error.what
    assert error.where.endswith("data_batch_3")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
def test_cifar_without_a_batch(tmp_path, name, packed):
    files = cifar10_files()
    del files[name]
    write_cifar(files, tmp_path / "cifar10", "cifar-10-batches-py", packed=packed)
    assert f"'{name}' is missing" in refuse(tmp_path, "cifar10").what


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_cifar(tmp_path, kept):
    write_cifar(cifar10_files(), tmp_path / "cifar10", "cifar-10-batches-py", packed=True)
    path = tmp_path / "cifar10" / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert path.name in refuse(tmp_path, "cifar10").where
    write_cifar(cifar10_files(), tmp_path / "cifar10", "cifar-10-batches-py", packed=False)
    path = tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert path.name in refuse(tmp_path, "cifar10").where


class Attack:
    """Runs a command when `pickle.loads` loads it."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("attack", [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (os.mkdir, "{}")])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_executes_nothing(tmp_path, attack, protocol):
    target = tmp_path / "owned"
    function, argument = attack
    content = pickle.dumps({"data": Attack(function, argument.format(target))}, protocol)
    pickle.loads(content)  # the attack is real
    assert target.exists()
    if target.is_dir():
        target.rmdir()
    else:
        target.unlink()
    write_cifar(cifar10_files(), tmp_path / "cifar10", "cifar-10-batches-py", packed=False)
    write(tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_1", content)
    assert "unsafe or damaged" in refuse(tmp_path, "cifar10").what
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        np.zeros(3, object),
        np.zeros(3, np.float64),
        Attack(np.load, "x"),
        Attack(np.ndarray, (10**12,)),
        b"\x80\x02cnumpy\ndtype\n(Vu1\nI00\nI01\ntRb.",
        b"\x80\x02cnumpy\nload\n.",
        b"",
        b"\x80\x02",
    ],
    ids=range(8),
)
def test_pickles_of_anything_but_byte_arrays(tmp_path, content):
    content = content if isinstance(content, bytes) else pickle.dumps(content, 2)
    with pytest.raises(DatasetError, match="pickle"):
        load_pickle(content, tmp_path)


def test_pickles_of_current_numpy_are_read_as_well(tmp_path):
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for content in (python2_pickle({"data": rows}), pickle.dumps({b"data": rows}, 4)):
        assert (load_pickle(content, tmp_path)[b"data"].numbers == rows).all()


# SVHN


def test_svhn(tmp_path):
    content = write_svhn(tmp_path / "svhn")
    source = find_source(tmp_path, "svhn")
    assert source.classes == tuple("0123456789")
    for split, (images, labels) in content.items():
        entries = list(source.entries(split))
        assert [entry.label for entry in entries] == [int(label) % 10 for label in labels.ravel()]
        for position, entry in enumerate(entries):
            assert (pixels(entry) == images[..., position]).all()
    assert entries[0].shown == "test_32x32.mat/test_000001.png"
    assert [entry.label for entry in entries][9] == 0


def test_damaged_svhn(tmp_path):
    content = write_svhn(tmp_path / "svhn")
    images, labels = content["val"]
    path = tmp_path / "svhn" / "test_32x32.mat"
    for variables, word in (
        ({"X": images, "y": labels[:-1]}, "11 labels"),
        ({"X": images, "y": labels + 1}, "label 11"),
        ({"X": images, "y": labels - 1}, "label 0"),
        ({"X": images[..., 0], "y": labels}, "X is"),
        ({"X": images}, "no variable 'y'"),
    ):
        write(path, mat_bytes(variables))
        error = refuse(tmp_path, "svhn")
        assert word in error.what
        assert error.where == str(path)
    whole = mat_bytes({"X": images, "y": labels})
    for content in (b"", b"\x89HDF\r\n" + bytes(600), whole[:-30], whole[:131], whole[:3000] + whole[3100:]):
        write(path, content)
        assert refuse(tmp_path, "svhn").where == str(path)
    path.unlink()
    assert "'test_32x32.mat' is missing" in refuse(tmp_path, "svhn").what


def test_a_matlab_bomb_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(matlab, "MAX_MAT_BYTES", 10 * 2**20)
    write_svhn(tmp_path / "svhn")
    bomb = zlib.compress(bytes(11 * 2**20))
    header = b"MATLAB 5.0".ljust(124) + b"\x00\x01IM"
    tag = (15).to_bytes(4, "little") + len(bomb).to_bytes(4, "little")
    write(tmp_path / "svhn" / "train_32x32.mat", header + tag + bomb)
    assert "inflates to more than 10485760 bytes" in refuse(tmp_path, "svhn").what


# Flowers


@pytest.mark.parametrize("packed", [False, True])
def test_flowers(tmp_path, packed):
    images = write_flowers(tmp_path / "flowers102", packed=packed)
    source = find_source(tmp_path, "flowers102")
    assert source.classes == tuple(str(label) for label in range(1, 13))
    assert any("sorted text (1, 10, 100" in note for note in source.notes)
    expected = {"train": [], "val": []}
    for number, label, content in images:
        split = "val" if number % 3 == 0 else "train"
        expected[split].append((f"image_{number:05d}.jpg", label - 1, content))
    for split in source.splits:
        found = listed(source, split)
        assert sorted(found) == expected[split]
        if not packed:
            assert found == sorted(expected[split], key=lambda image: (image[1], image[0]))
    assert any("order of the archive" in note for note in source.notes) == packed


def test_flowers_with_missing_images(tmp_path):
    folder = tmp_path / "flowers102"
    write_flowers(folder, packed=False)
    (folder / "jpg" / "image_00004.jpg").unlink()
    error = refuse(tmp_path, "flowers102")
    assert "1 image is missing: image_00004.jpg" in error.what
    assert error.where == str(folder / "jpg")
    shutil.rmtree(folder / "jpg")
    files = [(f"jpg/image_{number:05d}.jpg", jpeg(number)) for number in range(1, 36)]
    write(folder / "102flowers.tgz", gzip.compress(tar_bytes(files)))
    error = refuse(tmp_path, "flowers102")
    assert "1 image is missing: image_00036.jpg" in error.what
    assert error.where == str(folder / "102flowers.tgz")


def test_a_truncated_flowers_archive(tmp_path):
    write_flowers(tmp_path / "flowers102", packed=True)
    path = tmp_path / "flowers102" / "102flowers.tgz"
    path.write_bytes(path.read_bytes()[:-200])
    assert refuse(tmp_path, "flowers102").where == str(path)


def test_flowers_lists_that_do_not_fit(tmp_path):
    folder = tmp_path / "flowers102"
    write_flowers(folder, packed=True)
    sets = (folder / "setid.mat").read_bytes()
    for lists, word in (
        ({"trnid": [1, 2], "valid": [2, 3], "tstid": [4]}, "twice"),
        ({"trnid": [1, 2], "valid": [3], "tstid": [37]}, "beyond the 36 labels: 37"),
        ({"trnid": [1, 2], "valid": [0], "tstid": [4]}, "beyond"),
        ({"trnid": [1, 2], "valid": [3]}, "no variable 'tstid'"),
    ):
        write(folder / "setid.mat", mat_bytes({key: np.array([value]) for key, value in lists.items()}))
        assert word in refuse(tmp_path, "flowers102").what
    write(folder / "setid.mat", sets)
    write(folder / "imagelabels.mat", mat_bytes({"labels": np.array([[1, 3] * 18])}))
    assert "without gaps" in refuse(tmp_path, "flowers102").what


@pytest.mark.parametrize("name", ["102flowers.tgz", "imagelabels.mat", "setid.mat"])
def test_flowers_without_a_file(tmp_path, name):
    write_flowers(tmp_path / "flowers102", packed=True)
    (tmp_path / "flowers102" / name).unlink()
    error = refuse(tmp_path, "flowers102")
    assert "missing" in error.what
    assert name in error.fix


# DomainNet


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["domainnet_clipart", "domainnet_real", "domainnet"])
def test_domainnet(tmp_path, packed, place):
    domain = "real" if place.endswith("real") else "clipart"
    images = write_domain(tmp_path / place, domain, packed=packed)
    source = find_source(tmp_path, f"domainnet_{domain}")
    assert source.classes == ("The_Eiffel_Tower", "aircraft_carrier", "bat", "zebra")
    assert "differ for 2 of 4" in source.notes[0]
    for split in source.splits:
        # The lists number the first two classes in the opposite order.
        renumbered = [
            (name, {0: 1, 1: 0}.get(label, label), content) for name, label, content in images[split]
        ]
        assert listed(source, split) == sorted(renumbered, key=lambda image: (image[1], image[0]))
    shown = next(source.entries("train")).shown
    file = f"{domain}/The_Eiffel_Tower/{domain}_001_000000.jpg"
    assert shown == (f"{domain}.zip/" if packed else "") + file


@pytest.mark.parametrize("packed", [False, True])
def test_domainnet_lists_that_do_not_fit(tmp_path, packed):
    folder = tmp_path / "domainnet_sketch"
    write_domain(folder, "sketch", packed=packed)
    path = folder / "sketch_test.txt"
    lines = path.read_text().splitlines()
    for damaged, word in (
        ([*lines, "sketch/bat/none.jpg 2"], "lists 1 image that does not exist: sketch/bat/none.jpg"),
        ([*lines, "sketch/bat/none.jpg 3"], "class number 3"),
        ([*lines, "sketch/owl/none.jpg 2"], "class number 2"),
        ([*lines, "sketch/owl/none.jpg 999999"], "lists 1 image that does not exist: sketch/owl/none.jpg"),
        ([*lines, "sketch/../../etc/passwd 2"], "should be"),
        ([*lines, "sketch/../passwd 2"], "should be"),
        ([*lines, "/sketch/bat/x.jpg 2"], "should be"),
        ([*lines, "sketch/bat/x.jpg"], "should be"),
        ([*lines, "clipart/bat/x.jpg 2"], "should be"),
        ([*lines, lines[0]], "twice"),
        ([], "empty"),
    ):
        path.write_text("\n".join(damaged))
        assert word in refuse(tmp_path, "domainnet_sketch").what
    path.unlink()
    assert "'sketch_test.txt' is missing" in refuse(tmp_path, "domainnet_sketch").what


def test_a_domain_is_the_same_from_its_lists_and_from_class_folders(tmp_path):
    write_domain(tmp_path / "lists" / "domainnet_sketch", "sketch", packed=True)
    listed_source = find_source(tmp_path / "lists", "domainnet_sketch")
    for split in listed_source.splits:
        for entry in listed_source.entries(split):
            name = listed_source.classes[entry.label]
            path = tmp_path / "folders" / "domainnet_sketch" / split / name / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(entry.place.read())
    folders = find_source(tmp_path / "folders", "domainnet_sketch")
    assert folders.classes == listed_source.classes
    for split in folders.splits:
        assert listed(folders, split) == listed(listed_source, split)


def test_damaged_or_malicious_domain_archives(tmp_path):
    folder = tmp_path / "domainnet_sketch"
    write_domain(folder, "sketch", packed=True)
    path = folder / "sketch.zip"
    whole = path.read_bytes()
    write(path, whole[: len(whole) // 2])
    assert refuse(tmp_path, "domainnet_sketch").where == str(path)
    write(path, whole)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../evil.jpg", b"x")
    assert "evil.jpg" in refuse(tmp_path, "domainnet_sketch").what
    path.unlink()
    assert "The images are missing" in refuse(tmp_path, "domainnet_sketch").what
