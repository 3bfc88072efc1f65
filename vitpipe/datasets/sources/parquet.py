"""Image sets as parquet files of the Hugging Face hub: train-00000-of-00294.parquet, validation-..., ...

Columns: `image` (or `img`), a struct of `bytes` and `path`, and `label` (or `fine_label`). Rows are
shuffled, and images keep the order of the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vitpipe.contracts.errors import DatasetError, reason_of, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.catalogue import class_order
from vitpipe.datasets.sources.byte_ranges import Inline
from vitpipe.datasets.sources.class_listing import shown_below, visible_names
from vitpipe.datasets.sources.source import Form, ImageEntry, Source
from vitpipe.datasets.sources.synsets import names_of, read_synset_mapping

if TYPE_CHECKING:
    import pyarrow.parquet as pq

LAYOUT = "parquet files: data/train-00000-of-00294.parquet, data/validation-00000-of-00014.parquet, ..."
# Names of configurations on the hub: of CIFAR-10, CIFAR-100 and SVHN, and of the automatic conversion.
_FOLDERS = (".", "data", "plain_text", "cifar100", "cropped_digits", "default")
# Older versions of `datasets` add a fingerprint: train-00000-of-00001-0123456789abcdef.parquet.
_SHARD = re.compile(r"(train|validation|valid|val|test)-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet")
_VAL_NAMES = ("validation", "valid", "val")
# The first that exists is taken: CIFAR-100 has `fine_label` and `coarse_label`.
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "fine_label", "labels")
# ImageNet-1K on the hub appends the wnid to the original name: n01440764_18_n01440764.JPEG,
# ILSVRC2012_val_00000293_n01440764.JPEG.
_WITH_WNID_BEHIND = re.compile(r"(n\d{8}_\d+|ILSVRC2012_val_\d{8})_(n\d{8})(\.\w+)")
_WITH_WNID_BEFORE = re.compile(r"(n\d{8})_\d+\.\w+")
# 128 photographs of ImageNet (110 kB on average) are 14 MB.
_ROWS_AT_ONCE = 128
_ROWS_OF_LABELS_AT_ONCE = 65536
# Signatures of JPEG, PNG, WebP (a RIFF container) and BMP.
_ENDINGS = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"BM", ".bmp"))


@dataclass(frozen=True)
class _Columns:
    """Names of the columns, and the class names in the schema (empty if it has none)."""

    image: str
    label: str
    class_names: tuple[str, ...]


@dataclass(eq=False)
class ParquetSource(Source):
    """A set in parquet files.

    Attributes:
        files: by split, in the order of their numbers.
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
        """Yield the images in the order of files and rows; one batch of rows is in memory at a time."""
        position = 0
        for path in self.files[split]:
            shown = f"{shown_below(path.parent, self.root)}{path.name}"
            for image, label in _rows(path, self.columns, [self.columns.image], _ROWS_AT_ONCE):
                content = image.get("bytes") if isinstance(image, dict) else None
                if not isinstance(content, bytes):
                    raise DatasetError(
                        f"Image {position} of {split} has no bytes; it may only refer to a file",
                        where=path,
                        fix="download the parquet files that contain the images",
                    )
                # CIFAR and SVHN have no paths: the position in the split is the name.
                name = _original_name(image.get("path")) or f"{split}_{position:08d}{_ending(content)}"
                yield ImageEntry(name, label, Inline(content), f"{shown}/{name}")
                position += 1


def has_parquet(root: Path) -> bool:
    """Whether one of the usual folders contains parquet files."""
    return _parquet_folder(root) is not None


def read_parquet(root: Path, dataset: str) -> ParquetSource:
    """Read a set in parquet files; all labels and paths are checked here, images are not read.

    Raises:
        DatasetError: missing files or columns, labels out of range, or labels that contradict the wnids in
            the paths.
    """
    folder = _parquet_folder(root)
    if folder is None:
        raise DatasetError("There are no parquet files", where=root, fix=f"put {LAYOUT} into it")
    files = _files_of_splits(folder, dataset)
    # Of the first file only: all files of a release have the same schema, and `_scan` fails where one has
    # not.
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
    """Files of train and val, without gaps; val is the test set where only that exists and has labels."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in visible_names(folder):
        if match := _SHARD.fullmatch(name):
            found.setdefault(match[1], []).append((int(match[2]), int(match[3]), name))
    # ImageNet's test labels are not public (-1 in every row).
    names = _VAL_NAMES if dataset.startswith("imagenet") else (*_VAL_NAMES, "test")
    val = next((name for name in names if name in found), names[0])
    files = {}
    for split, prefix in (("train", "train"), ("val", val)):
        shards = found.get(prefix, [])
        if not shards:
            raise DatasetError(
                f"There are no {prefix}-*.parquet files", where=folder, fix="download all files of the set"
            )
        # Files of two releases in one folder have different totals: their images would be counted twice.
        wanted = max(total for _, total, _ in shards)
        missing = sorted(set(range(wanted)) - {number for number, _, _ in shards})
        if missing or len(shards) != wanted:
            raise DatasetError(
                f"{prefix}: {counted(len(shards), 'file')} found, {wanted} expected; missing numbers: "
                f"{some(missing) or 'none, some occur twice'}",
                where=folder,
                fix="download the missing files, and remove files of another release",
            )
        files[split] = [folder / name for _, _, name in sorted(shards)]
    return files


def _open(path: Path) -> pq.ParquetFile:
    # Imported on use: only sets in parquet need it, and the readers of all formats are imported together.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DatasetError:
    reason = reason_of(error)
    return DatasetError(f"The parquet file is damaged ({reason})", where=path, fix="download it again")


def _read_columns(path: Path) -> _Columns:
    with _open(path) as file:
        schema = file.schema_arrow
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise DatasetError(
            f"The columns are {', '.join(schema.names)}; expected are one of {', '.join(_IMAGE_COLUMNS)} "
            f"and one of {', '.join(_LABEL_COLUMNS)}",
            where=path,
            fix="take the parquet files of the image classification set",
        )
    # `datasets` stores its features, and with them the names of a ClassLabel, as JSON in the schema.
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about["info"]["features"][label]["names"]
        class_names = tuple(str(name) for name in names)
    except (ValueError, KeyError, TypeError):
        class_names = ()  # written by another tool
    return _Columns(image, label, class_names)


def _rows(path: Path, columns: _Columns, wanted: list[str], num_rows: int) -> Iterator[tuple[Any, int]]:
    """Yield (image column, label) of every row; None for the image if it is not read. Labels count from 0."""
    import pyarrow as pa

    with _open(path) as file:
        position = 0
        # Around the loop, because damage shows only when its row group is decoded.
        try:
            for batch in file.iter_batches(num_rows, columns=[*wanted, columns.label], use_threads=False):
                # A projection to `image.path` of a file without that field leaves the column out.
                if columns.image in batch.schema.names:
                    images = batch.column(columns.image).to_pylist()
                else:
                    images = [None] * batch.num_rows
                for image, label in zip(images, batch.column(columns.label).to_pylist(), strict=True):
                    if not isinstance(label, int) or label < 0:
                        raise DatasetError(
                            f"Row {position} has the label {label}",
                            where=path,
                            fix="use files whose labels are class numbers; -1 marks unlabelled test images",
                        )
                    yield image, label
                    position += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


def _scan(files: dict[str, list[Path]], columns: _Columns) -> tuple[dict[int, str], int]:
    """Wnid by label, as far as the paths contain it, and the largest label plus one."""
    wnid_of: dict[int, str] = {}
    label_of: dict[str, int] = {}
    num_labels = 0
    for path in (*files["train"], *files["val"]):
        # The nested field alone: parquet stores columns separately, so the images are not read from disk.
        for row, (image, label) in enumerate(
            _rows(path, columns, [f"{columns.image}.path"], _ROWS_OF_LABELS_AT_ONCE)
        ):
            num_labels = max(num_labels, label + 1)
            if columns.class_names and num_labels > len(columns.class_names):
                raise DatasetError(
                    f"Row {row} has the label {label}; the schema has "
                    f"{counted(len(columns.class_names), 'class', 'classes')}",
                    where=path,
                    fix="take all files from the same release of the set",
                )
            wnid = _wnid(image.get("path") if isinstance(image, dict) else None)
            if wnid and (
                wnid_of.setdefault(label, wnid) != wnid or label_of.setdefault(wnid, label) != label
            ):
                raise DatasetError(
                    f"Row {row} has the label {label} and the wnid {wnid}, but in other rows {label} is "
                    f"{wnid_of[label]} or {wnid} is {label_of.get(wnid, label)}",
                    where=path,
                    fix="take all files from the same release of the set",
                )
    return wnid_of, num_labels


def _classes(
    dataset: str, columns: _Columns, wnids: dict[int, str], num_classes: int, folder: Path
) -> tuple[tuple[str, ...], str]:
    """Class keys in the order of labels, and their origin as text."""
    # Wnids first: only they show that the labels are the standard class numbers, which checkpoints rely on.
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
                f"{counted(len(odd), 'wnid', 'wnids')} in the paths with non-standard class numbers: "
                f"{some(sorted(odd))}",
                where=folder,
                fix="use files whose labels are the standard class numbers, or another form of the set",
            )
        return canonical, "the standard list of ILSVRC 2012, because the paths do not name all of them"
    if len(set(columns.class_names)) == num_classes:
        return columns.class_names, "the schema"
    return tuple(str(label) for label in range(num_classes)), "the labels: they have no names"


def _original_name(path: str | None) -> str | None:
    """The file name of an image as in its original archive; None when it has none."""
    # The appended wnid is cut off, so that an image has the same name from every format.
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


FORMAT = Form(lambda _: (LAYOUT,), lambda root, _: has_parquet(root), read_parquet)
