"""Parquet files as Hugging Face's hub hands out image sets: train-00000-of-00294.parquet, validation-..., ...

Columns: `image` (or `img`), a struct of `bytes` and `path`, and `label` (or `fine_label`). Rows are shuffled,
so images keep the order of the files. For ImageNet the path names the wnid, before or after the image's own
name (n01440764_18_n01440764.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG); the latter is cut off, so that an
image has the same name as in the original archives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.catalogue import class_order
from vitpipe.datasets.sources.byte_ranges import Inline
from vitpipe.datasets.sources.class_listing import shown_below, visible_names
from vitpipe.datasets.sources.source import ImageEntry, Source
from vitpipe.datasets.sources.synsets import names_of, read_synset_mapping

if TYPE_CHECKING:
    import pyarrow.parquet as pq

LAYOUT = "parquet files: data/train-00000-of-00294.parquet, data/validation-00000-of-00014.parquet, ..."
_FOLDERS = (".", "data", "plain_text", "cifar100", "cropped_digits", "default")
_SHARD = re.compile(r"(train|validation|valid|val|test)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet")
_VAL_NAMES = ("validation", "valid", "val")
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "fine_label", "labels")
_WITH_WNID_BEHIND = re.compile(r"(n\d{8}_\d+|ILSVRC2012_val_\d{8})_(n\d{8})(\.\w+)")
_WITH_WNID_BEFORE = re.compile(r"(n\d{8})_\d+\.\w+")
# Few enough that a batch of full-size photographs stays below 20 MB.
_ROWS_AT_ONCE = 128
_ROWS_OF_LABELS_AT_ONCE = 65536
_ENDINGS = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"BM", ".bmp"))


@dataclass(frozen=True)
class _Columns:
    """What the columns are called, and what the schema says about labels."""

    image: str
    label: str
    class_names: tuple[str, ...]


@dataclass(eq=False)
class ParquetSource(Source):
    """A set in parquet files.

    Attributes:
        files: of each split, in the order of their numbers.
    """

    dataset: str
    root: Path
    form: str
    classes: tuple[str, ...]
    files: dict[str, list[Path]] = field(repr=False)
    columns: _Columns = field(repr=False)
    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    notes: tuple[str, ...] = ()

    def entries(self, split: str) -> Iterator[ImageEntry]:
        """File by file, row by row; a batch of rows is in memory at a time."""
        position = 0
        for path in self.files[split]:
            shown = f"{shown_below(path.parent, self.root)}{path.name}"
            for image, label in _rows(path, self.columns, [self.columns.image], _ROWS_AT_ONCE):
                content = image.get("bytes") if isinstance(image, dict) else None
                if not isinstance(content, bytes):
                    raise DatasetError(
                        f"Image {position} of {split} has no bytes; maybe it only points at a file",
                        where=path,
                        fix="get the parquet files with the images inside",
                    )
                name = _plain_name(image.get("path")) or f"{split}_{position:08d}{_ending(content)}"
                yield ImageEntry(name, label, Inline(content), f"{shown}/{name}")
                position += 1


def is_parquet_there(root: Path) -> bool:
    """Whether there are parquet files in one of the usual folders."""
    return _parquet_folder(root) is not None


def read_parquet(root: Path, dataset: str) -> ParquetSource:
    """A set in parquet files. Labels and paths are read to the end here, images are not.

    Raises:
        DatasetError: missing files or columns, labels out of range, or labels that contradict the wnids in
            the paths.
    """
    folder = _parquet_folder(root)
    if folder is None:
        raise DatasetError("There are no parquet files", where=root, fix=f"put {LAYOUT} there")
    files = _files_of_splits(folder, dataset)
    columns = _read_columns(files["train"][0])
    wnids, num_labels = _scan(files, columns)
    num_classes = len(columns.class_names) or num_labels
    classes, origin = _classes(dataset, columns, wnids, num_classes, folder)
    class_names = names_of(classes, read_synset_mapping(root)) or columns.class_names
    notes = (
        "images keep the order of the parquet files, which is shuffled and not by class",
        f"class keys come from {origin}",
    )
    return ParquetSource(
        dataset, root, "Hugging Face parquet", classes, files, columns, class_names, notes=notes
    )


def _parquet_folder(root: Path) -> Path | None:
    folders = [root / name for name in _FOLDERS]
    return next(
        (f for f in folders if f.is_dir() and any(_SHARD.fullmatch(name) for name in visible_names(f))), None
    )


def _files_of_splits(folder: Path, dataset: str) -> dict[str, list[Path]]:
    """Files of train and val, all there; the test set is val where there is none and its labels are known."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in visible_names(folder):
        if match := _SHARD.fullmatch(name):
            found.setdefault(match[1], []).append((int(match[2]), int(match[3]), name))
    # ImageNet's test labels are secret (-1 in every row).
    names = _VAL_NAMES if dataset.startswith("imagenet") else (*_VAL_NAMES, "test")
    val = next((name for name in names if name in found), names[0])
    files = {}
    for split, prefix in (("train", "train"), ("val", val)):
        shards = found.get(prefix, [])
        if not shards:
            raise DatasetError(
                f"There are no {prefix}-*.parquet files", where=folder, fix="get all files of the set"
            )
        wanted = max(total for _, total, _ in shards)
        missing = sorted(set(range(wanted)) - {number for number, _, _ in shards})
        if missing or len(shards) != wanted:
            raise DatasetError(
                f"{prefix}: {len(shards)} files are there and {wanted} should be; missing numbers: "
                f"{some(missing) or 'none, some are there twice'}",
                where=folder,
                fix="get the missing files, and remove files of another release",
            )
        files[split] = [folder / name for _, _, name in sorted(shards)]
    return files


def _open(path: Path) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DatasetError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return DatasetError(f"The parquet file is damaged ({reason})", where=path, fix="get it again")


def _read_columns(path: Path) -> _Columns:
    with _open(path) as file:
        schema = file.schema_arrow
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise DatasetError(
            f"The columns are {', '.join(schema.names)}; there should be one of {', '.join(_IMAGE_COLUMNS)} "
            f"and one of {', '.join(_LABEL_COLUMNS)}",
            where=path,
            fix="take the parquet files of the image classification set",
        )
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about["info"]["features"][label]["names"]
        class_names = tuple(str(name) for name in names)
    except (ValueError, KeyError, TypeError):
        class_names = ()  # files written by other tools carry no names
    return _Columns(image, label, class_names)


def _rows(path: Path, columns: _Columns, wanted: list[str], num_rows: int) -> Iterator[tuple[Any, int]]:
    """(image column, label) of every row; labels are numbers from 0."""
    import pyarrow as pa

    with _open(path) as file:
        position = 0
        try:
            for batch in file.iter_batches(num_rows, columns=[*wanted, columns.label], use_threads=False):
                if columns.image in batch.schema.names:
                    images = batch.column(columns.image).to_pylist()
                else:
                    images = [None] * batch.num_rows
                for image, label in zip(images, batch.column(columns.label).to_pylist(), strict=True):
                    if not isinstance(label, int) or label < 0:
                        raise DatasetError(
                            f"Row {position} has the label {label}",
                            where=path,
                            fix="take files whose labels are class numbers; -1 marks unlabelled test images",
                        )
                    yield image, label
                    position += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


def _scan(files: dict[str, list[Path]], columns: _Columns) -> tuple[dict[int, str], int]:
    """The wnid of each label, as far as paths name it, and one more than the largest label."""
    wnid_of: dict[int, str] = {}
    label_of: dict[str, int] = {}
    num_labels = 0
    for path in (*files["train"], *files["val"]):
        for row, (image, label) in enumerate(
            _rows(path, columns, [f"{columns.image}.path"], _ROWS_OF_LABELS_AT_ONCE)
        ):
            num_labels = max(num_labels, label + 1)
            if columns.class_names and num_labels > len(columns.class_names):
                raise DatasetError(
                    f"Row {row} has the label {label}; the schema names {len(columns.class_names)} classes",
                    where=path,
                    fix="take all files from the same release of the set",
                )
            wnid = _wnid(image.get("path") if isinstance(image, dict) else None)
            if wnid and (
                wnid_of.setdefault(label, wnid) != wnid or label_of.setdefault(wnid, label) != label
            ):
                raise DatasetError(
                    f"Row {row} with the label {label} is of {wnid}, but other rows say that {label} is "
                    f"{wnid_of[label]} or that {wnid} is {label_of.get(wnid, label)}",
                    where=path,
                    fix="take all files from the same release of the set",
                )
    return wnid_of, num_labels


def _classes(
    dataset: str, columns: _Columns, wnids: dict[int, str], num_classes: int, folder: Path
) -> tuple[tuple[str, ...], str]:
    """Class keys in the order of labels, and where they come from."""
    found = [wnids[label] for label in sorted(wnids)]
    if found != sorted(found):
        raise DatasetError(
            "The labels do not follow the order of the sorted wnids in the paths",
            where=folder,
            fix="use files whose labels are the standard class numbers, or another form of the set",
        )
    if len(found) == num_classes:
        return tuple(found), "the wnids in the paths"
    canonical = class_order("imagenet") if dataset.startswith("imagenet") and num_classes == 1000 else ()
    if canonical:
        odd = [wnid for label, wnid in wnids.items() if canonical[label] != wnid]
        if odd:
            raise DatasetError(
                f"{len(odd)} wnids in the paths have other class numbers than usual: {some(sorted(odd))}",
                where=folder,
                fix="use files whose labels are the standard class numbers, or another form of the set",
            )
        return canonical, "the standard list of ILSVRC 2012, because the paths do not name all of them"
    if len(set(columns.class_names)) == num_classes:
        return columns.class_names, "the schema"
    return tuple(str(label) for label in range(num_classes)), "the labels: they have no names"


def _plain_name(path: str | None) -> str | None:
    """The file name of an image as its original archive has it; None when there is none."""
    name = PurePosixPath(path or "").name
    match = _WITH_WNID_BEHIND.fullmatch(name)
    return match[1] + match[3] if match else name or None


def _wnid(path: str | None) -> str | None:
    name = PurePosixPath(path or "").name
    if match := _WITH_WNID_BEHIND.fullmatch(name):
        return match[2]
    return match[1] if (match := _WITH_WNID_BEFORE.fullmatch(name)) else None


def _ending(content: bytes) -> str:
    return next((ending for magic, ending in _ENDINGS if content.startswith(magic)), ".bin")
