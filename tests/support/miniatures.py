"""Miniatures of the real sets, written in exactly their released layouts, including the archives.

Every writer fills a set's folder (such as `root/imagenet`); those of the small sets return its content.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat

FIRST_WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361", "n02056570")
DEVKIT = "ILSVRC2012_devkit_t12"
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def jpeg(seed: int, size: int = 8) -> bytes:
    """A small image of random pixels; every seed gives different bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_bytes(files: list[tuple[str, bytes]]) -> bytes:
    """A plain tar with the members in the given order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def mat_bytes(variables: dict) -> bytes:
    """A compressed MATLAB 5 file."""
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=True)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@dataclass(frozen=True)
class MiniImageNet:
    """A few classes of ImageNet-1K.

    Attributes:
        train: by wnid, (name, bytes); by name.
        val: (name, wnid, bytes), by name; classes are in random order, as in the real set.
    """

    wnids: tuple[str, ...]
    train: dict[str, list[tuple[str, bytes]]]
    val: list[tuple[str, str, bytes]]

    def words(self, wnid: str) -> str:
        # Two synonyms, because names of WordNet are lists: "tench, Tinca tinca".
        return f"thing {wnid[-3:]}, res minima"

    def ids(self) -> dict[str, int]:
        """ILSVRC2012_IDs, in another order than the wnids."""
        # A permutation as long as the number of classes has no factor 7.
        return {wnid: 1 + (7 * index + 3) % len(self.wnids) for index, wnid in enumerate(self.wnids)}

    def expected(self, split: str, wnids: tuple[str, ...] | None = None) -> list[tuple[str, int, bytes]]:
        """(name, class number, bytes) in the canonical order."""
        images = {
            "train": self.train,
            "val": {w: [(n, b) for n, wnid, b in self.val if wnid == w] for w in self.wnids},
        }
        return [
            (name, label, content)
            for label, wnid in enumerate(wnids or self.wnids)
            for name, content in sorted(images[split][wnid])
        ]


def mini_imagenet(
    wnids: tuple[str, ...] = FIRST_WNIDS, num_train: int = 3, num_val: int = 2, seed: int = 0
) -> MiniImageNet:
    """Its class count must not be a multiple of 7: see `MiniImageNet.ids`."""
    assert len(wnids) % 7
    generator = np.random.default_rng(seed)
    train = {
        wnid: sorted(
            # Numbers of different length: as text, 10026 sorts before 18.
            (f"{wnid}_{number}.JPEG", jpeg(1000 * index + number))
            for number in generator.choice(np.arange(5, 12_000), num_train, replace=False)
        )
        for index, wnid in enumerate(wnids)
    }
    classes = generator.permutation(np.repeat(wnids, num_val)).tolist()
    val = [
        (f"ILSVRC2012_val_{number:08d}.JPEG", wnid, jpeg(900_000 + number))
        for number, wnid in enumerate(classes, start=1)
    ]
    return MiniImageNet(tuple(wnids), train, val)


def write_class_folders(mini: MiniImageNet, folder: Path) -> None:
    """train/<wnid>/, val/<wnid>/, and LOC_synset_mapping.txt."""
    write_train_folders(mini, folder / "train")
    for name, wnid, content in mini.val:
        write(folder / "val" / wnid / name, content)
    write_synset_mapping(mini, folder)


def write_train_folders(mini: MiniImageNet, folder: Path) -> None:
    for wnid, images in mini.train.items():
        for name, content in images:
            write(folder / wnid / name, content)


def write_synset_mapping(mini: MiniImageNet, folder: Path) -> None:
    write(folder / "LOC_synset_mapping.txt", "".join(f"{wnid} {mini.words(wnid)}\n" for wnid in mini.wnids))


def class_tar(mini: MiniImageNet, wnid: str) -> bytes:
    """One class; members are not sorted, as in the real ones."""
    return tar_bytes(mini.train[wnid][::-1])


def train_tar(mini: MiniImageNet) -> bytes:
    """ILSVRC2012_img_train.tar: a tar of one tar per class, not sorted."""
    return tar_bytes([(f"{wnid}.tar", class_tar(mini, wnid)) for wnid in mini.wnids[::-1]])


def val_tar(mini: MiniImageNet) -> bytes:
    """ILSVRC2012_img_val.tar: flat, not sorted."""
    return tar_bytes([(name, content) for name, _, content in mini.val[1:] + mini.val[:1]])


def meta_mat(mini: MiniImageNet) -> bytes:
    """The devkit's meta.mat: leaves by ILSVRC2012_ID, then inner nodes."""
    ids = mini.ids()
    rows = [(ids[wnid], wnid, mini.words(wnid), "a thing", 0, [], 0, 3) for wnid in sorted(ids, key=ids.get)]
    rows.append((len(ids) + 1, "n00001740", "entity", "that which is", 2, [1, 2], 1, 0))
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
             "num_train_images")  # fmt: skip
    synsets = np.empty((len(rows), 1), [(name, object) for name in names])
    # MATLAB stores numbers as doubles.
    for index, row in enumerate(rows):
        synsets[index, 0] = tuple(np.float64(v) if isinstance(v, int) else v for v in row)
    return mat_bytes({"synsets": synsets})


def ground_truth(mini: MiniImageNet) -> str:
    """The devkit's list: the ILSVRC2012_ID of each validation image."""
    return "".join(f"{mini.ids()[wnid]}\n" for _, wnid, _ in mini.val)


def devkit_files(mini: MiniImageNet) -> list[tuple[str, bytes]]:
    return [
        (f"{DEVKIT}/readme.txt", b"about"),
        (f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", ground_truth(mini).encode()),
        (f"{DEVKIT}/data/meta.mat", meta_mat(mini)),
    ]


def write_original(mini: MiniImageNet, folder: Path) -> None:
    """The three archives of image-net.org."""
    write(folder / "ILSVRC2012_img_train.tar", train_tar(mini))
    write(folder / "ILSVRC2012_img_val.tar", val_tar(mini))
    write(folder / f"{DEVKIT}.tar.gz", gzip.compress(tar_bytes(devkit_files(mini))))


def write_kaggle(mini: MiniImageNet, folder: Path) -> None:
    """What Kaggle's archive of the object localisation challenge unpacks to."""
    data = folder / "ILSVRC" / "Data" / "CLS-LOC"
    write_train_folders(mini, data / "train")
    for name, _, content in mini.val:
        write(data / "val" / name, content)
    write(data / "test" / "ILSVRC2012_test_00000001.JPEG", jpeg(1))
    write_synset_mapping(mini, folder)
    with (folder / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("ImageId", "PredictionString"))
        rows.writerows(
            (name[:-5], f"{wnid} 85 1 499 272 {wnid} 1 1 2 2 ") for name, wnid, _ in mini.val[::-1]
        )


def write_parquet(
    mini: MiniImageNet, folder: Path, *, num_train_files: int = 2, with_paths: bool = True
) -> None:
    """data/train-00000-of-00002.parquet, ..., data/validation-00000-of-00001.parquet, as on Hugging Face's hub."""
    train = [
        (_hub_name(name, wnid), mini.wnids.index(wnid), content)
        for wnid, images in mini.train.items()
        for name, content in images
    ]
    # The hub's files are shuffled.
    train = [train[index] for index in np.random.default_rng(1).permutation(len(train))]
    val = [(_hub_name(name, wnid), mini.wnids.index(wnid), content) for name, wnid, content in mini.val]
    for split, rows, num_files in (("train", train, num_train_files), ("validation", val, 1)):
        for number in range(num_files):
            path = folder / "data" / f"{split}-{number:05d}-of-{num_files:05d}.parquet"
            write_parquet_file(
                path,
                [
                    (name if with_paths else None, label, content)
                    for name, label, content in rows[number::num_files]
                ],
                names=[mini.words(wnid) for wnid in mini.wnids],
            )


def write_parquet_file(path: Path, rows, *, names=(), image: str = "image", label: str = "label") -> None:
    """Rows of (path, label, bytes)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if names else None
    schema = pa.schema([(image, struct_type), (label, pa.int64())], metadata=about)
    images = [{"bytes": content, "path": name} for name, _, content in rows]
    table = pa.Table.from_arrays(
        [pa.array(images, struct_type), pa.array([number for _, number, _ in rows], pa.int64())],
        schema=schema,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several row groups even in a small file, as in the real ones.
    pq.write_table(table, path, row_group_size=4)


def _hub_name(name: str, wnid: str) -> str:
    stem, _, ending = name.rpartition(".")
    return f"{stem}_{wnid}.{ending}"


def write_class_tars(mini: MiniImageNet, folder: Path) -> None:
    """<folder>/<wnid>.tar, as winter21_whole/ and fall11_whole/ are."""
    for wnid in mini.wnids:
        write(folder / f"{wnid}.tar", class_tar(mini, wnid))


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 and numpy 1 did: strings are byte strings, `_reconstruct` is in numpy.core.

    The pure Python `pickle._Pickler`, because the C one has no `dispatch` table to replace.
    """

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def __init__(self, file) -> None:
        super().__init__(file, protocol=2)

    def save_text(self, obj) -> None:
        content = obj if isinstance(obj, bytes) else obj.encode("latin1")
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_text

    def save_global(self, obj, name=None) -> None:
        if getattr(obj, "__name__", "") == "_reconstruct":
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch[type] = dispatch[type(lambda: 0)] = dispatch[type(len)] = save_global


def python2_pickle(content) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer).dump(content)
    return buffer.getvalue()


def cifar_batch(seed: int, num_rows: int, num_classes: int, label_key: str, note: str) -> dict:
    """A batch as in the pickles."""
    generator = np.random.default_rng(seed)
    return {
        "data": generator.integers(0, 256, (num_rows, 3072), np.uint8),
        label_key: generator.integers(0, num_classes, num_rows).tolist(),
        "batch_label": note,
        "filenames": [f"thing_s_{seed:02d}{row:04d}.png" for row in range(num_rows)],
    }


def cifar10_files(num_rows: int = 4) -> dict[str, dict]:
    """The pickles of CIFAR-10 by name."""
    files = {
        f"data_batch_{number}": cifar_batch(number, num_rows, 10, "labels", f"training batch {number} of 5")
        for number in range(1, 6)
    }
    files["test_batch"] = cifar_batch(9, num_rows, 10, "labels", "testing batch 1 of 1")
    files["batches.meta"] = {
        "num_cases_per_batch": num_rows, "label_names": list(CIFAR_NAMES), "num_vis": 3072,
    }  # fmt: skip
    return files


def cifar100_files(num_rows: int = 6) -> dict[str, dict]:
    """The pickles of CIFAR-100 by name."""
    files = {
        "train": cifar_batch(1, num_rows, 100, "fine_labels", "training batch 1 of 1"),
        "test": cifar_batch(2, num_rows, 100, "fine_labels", "testing batch 1 of 1"),
    }
    for batch in files.values():
        batch["coarse_labels"] = [label // 5 for label in batch["fine_labels"]]
    files["meta"] = {
        "fine_label_names": [f"fine_{number}" for number in range(100)],
        "coarse_label_names": [f"coarse_{number}" for number in range(20)],
    }
    return files


def write_cifar(files: dict[str, dict], folder: Path, name: str, *, packed: bool) -> None:
    """cifar-10-batches-py/ or its cifar-10-python.tar.gz; the archive's members are not sorted, as in the real ones."""
    pickles = [(f"{name}/{file}", python2_pickle(content)) for file, content in files.items()]
    if not packed:
        for path, content in pickles:
            write(folder / path, content)
        return
    archive = {"cifar-10-batches-py": "cifar-10-python", "cifar-100-python": "cifar-100-python"}[name]
    members = [*pickles[3:], (f"{name}/readme.html", b"<html>"), *pickles[:3]]
    write(folder / f"{archive}.tar.gz", gzip.compress(tar_bytes(members)))


def write_svhn(folder: Path, num_images: int = 12) -> dict[str, tuple]:
    """The two MATLAB files; returns (X, y) by split."""
    content = {}
    for split, name in (("train", "train_32x32.mat"), ("val", "test_32x32.mat")):
        generator = np.random.default_rng(len(name))
        images = generator.integers(0, 256, (32, 32, 3, num_images), np.uint8)
        # 1 to 10, where 10 is the digit 0.
        labels = (1 + np.arange(num_images, dtype=np.uint8) % 10).reshape(-1, 1)
        write(folder / name, mat_bytes({"X": images, "y": labels}))
        content[split] = (images, labels)
    return content


def write_flowers(folder: Path, *, packed: bool, num_classes: int = 12, per_class: int = 3) -> list[tuple]:
    """Images and lists; returns (number, label from 1, bytes) of every image. Each class has one image per list."""
    # Reversed, so that image numbers and labels do not sort alike.
    labels = np.repeat(np.arange(1, num_classes + 1), per_class)[::-1]
    images = [(number, int(label), jpeg(number)) for number, label in enumerate(labels, start=1)]
    numbers = np.arange(1, len(labels) + 1)
    write(folder / "imagelabels.mat", mat_bytes({"labels": labels.astype(np.float64).reshape(1, -1)}))
    lists = {name: numbers[index::per_class] for index, name in enumerate(("trnid", "valid", "tstid"))}
    write(folder / "setid.mat", mat_bytes({k: v.astype(np.float64).reshape(1, -1) for k, v in lists.items()}))
    files = [(f"jpg/image_{number:05d}.jpg", content) for number, _, content in images]
    if packed:
        write(folder / "102flowers.tgz", gzip.compress(tar_bytes(files[::-1])))
    for name, content in files if not packed else ():
        write(folder / name, content)
    return images


def write_domain(folder: Path, domain: str, *, packed: bool, per_class: int = 3) -> dict[str, list[tuple]]:
    """A domain with four classes; returns (name, label, bytes) by split, with the labels of the lists."""
    # One name with a capital, which sorts first: so the lists' numbers differ from those of sorted folders.
    classes = ("aircraft_carrier", "The_Eiffel_Tower", "bat", "zebra")
    lines: dict[str, list[str]] = {"train": [], "test": []}
    images: dict[str, list[tuple]] = {"train": [], "val": []}
    files = []
    for label, name in enumerate(classes):
        for number in range(per_class):
            path = f"{domain}/{name}/{domain}_{label:03d}_{number:06d}.jpg"
            content = jpeg(100 * label + number)
            split = "train" if number < per_class - 1 else "test"
            lines[split].append(f"{path} {label}\n")
            images["train" if split == "train" else "val"].append((path.split("/")[-1], label, content))
            files.append((path, content))
    for split, rows in lines.items():
        write(folder / f"{domain}_{split}.txt", "".join(rows[::-1]))
    if packed:
        with zipfile.ZipFile(folder / f"{domain}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in files:
                archive.writestr(path, content)
    for path, content in files if not packed else ():
        write(folder / path, content)
    return images
