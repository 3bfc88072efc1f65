"""One domain of DomainNet (Peng et al., ICCV 2019): <domain>.zip or its folder, and two lists of images.

The lists, <domain>_train.txt and <domain>_test.txt, have one line per image,
`clipart/aircraft_carrier/clipart_001_000018.jpg 0`. There are 345 classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.archives import safe_zip_members
from vitpipe.datasets.sources.byte_ranges import ByteRange, FileSpan, ZipMember
from vitpipe.datasets.sources.class_listing import (
    ClassSource,
    FoundImage,
    ImagesByClass,
    ListedImages,
    first_existing,
    visible_names,
)
from vitpipe.datasets.sources.source import Form

# There is no list named val; the published results are on test.
_LISTS = {"train": "train", "val": "test"}


class _Line(NamedTuple):
    """One image of a list."""

    path: str
    label: int

    @property
    def class_name(self) -> str:
        """The folder of the image."""
        return PurePosixPath(self.path).parts[1]


def domain_of(dataset: str) -> str:
    """`clipart` of `domainnet_clipart`."""
    return dataset.removeprefix("domainnet_")


def layout_of(dataset: str) -> str:
    """The required files, as one line of text."""
    domain = domain_of(dataset)
    return f"{domain}.zip (or its folder {domain}/) with {domain}_train.txt and {domain}_test.txt"


def has_domain(root: Path, dataset: str) -> bool:
    """Whether the domain's archive, folder or lists exist."""
    domain = domain_of(dataset)
    names = (domain, f"{domain}.zip", f"{domain}_train.txt", f"{domain}_test.txt")
    return any((root / name).exists() for name in names)


def read_domain(root: Path, dataset: str) -> ClassSource:
    """Read one domain; the folder takes precedence over the archive.

    Raises:
        DatasetError: when a file is missing or damaged, or the lists do not match the images.
    """
    domain = domain_of(dataset)
    paths = {split: _list_path(root, f"{domain}_{name}.txt", dataset) for split, name in _LISTS.items()}
    lines = {split: _read_list(path, domain) for split, path in paths.items()}
    classes, notes = _classes(lines, paths)
    folder, archive = root / domain, root / f"{domain}.zip"
    if folder.is_dir():
        present = _files_of_folder(root, domain)
    elif archive.is_file():
        present = {
            entry.name: ZipMember(str(archive), entry.name, entry.crc32)
            for entry in safe_zip_members(archive)
        }
    else:
        raise DatasetError("The images are missing", where=archive, fix=f"put {layout_of(dataset)} there")
    where = folder if folder.is_dir() else archive
    shown = "" if folder.is_dir() else f"{archive.name}/"
    parts: dict[str, ImagesByClass] = {}
    for split, rows in lines.items():
        # "Cleaned" and original releases of a domain have different images under the same archive name.
        missing = [row.path for row in rows if row.path not in present]
        if missing:
            raise DatasetError(
                f"{paths[split].name} lists {counted(len(missing), 'image that does', 'images that do')} "
                f"not exist: {some(missing)}",
                where=where,
                fix=f"download {domain}.zip and the lists again, of the same version (cleaned or original)",
            )
        parts[split] = ListedImages(
            ((PurePosixPath(row.path).parts[1], _found(row.path, present[row.path], shown)) for row in rows),
            where,
        )
    form = f"folder {domain}/ with its lists" if folder.is_dir() else f"{archive.name} with its lists"
    return ClassSource(dataset, root, form, classes, parts, notes=notes)


def _list_path(root: Path, name: str, dataset: str) -> Path:
    path = first_existing(root / name, root / "splits" / name)
    if path is None:
        raise DatasetError(f"The list '{name}' is missing", where=root, fix=f"put {layout_of(dataset)} there")
    return path


def _read_list(path: Path, domain: str) -> list[_Line]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not text.strip():
            continue
        # From the right: file names may contain blanks.
        file, _, label = text.strip().rpartition(" ")
        parts = PurePosixPath(file).parts
        # An untrusted list must not lead to files outside the domain's folder.
        if len(parts) != 3 or parts[0] != domain or ".." in parts or not label.isdecimal():
            raise DatasetError(
                f"Line {number} is '{text[:80]}' and should be '{domain}/<class>/<file> <class number>'",
                where=path,
                fix="download the list again",
            )
        lines.append(_Line(file, int(label)))
    if not lines or len({line.path for line in lines}) != len(lines):
        raise DatasetError(
            "The list is empty or names an image twice", where=path, fix="download the list again"
        )
    return lines


def _classes(
    lines: dict[str, list[_Line]], paths: dict[str, Path]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Folder names in the order of class numbers, and notes on this order."""
    name_of: dict[int, str] = {}
    number_of: dict[str, int] = {}
    for split, rows in lines.items():
        for row in rows:
            (path, label), name = row, row.class_name
            if name_of.setdefault(label, name) != name or number_of.setdefault(name, label) != label:
                raise DatasetError(
                    f"'{path}' has the class number {label}, which '{name_of[label]}' has as well, or "
                    f"'{name}' has another number on another line",
                    where=paths[split],
                    fix="download both lists again, of the same release",
                )
    # Not the lists' own numbers: the official preparation moves the images into class folders, whose
    # sorted names give the numbers of released checkpoints. Byte order puts names with a capital first.
    # So the set is also the same from its lists and from class folders.
    classes = tuple(sorted(number_of))
    moved = sum(number_of[name] != label for label, name in enumerate(classes))
    if not moved:
        return classes, ()
    return classes, (
        "classes are numbered by sorted folder name, capitals first, as in released checkpoints; "
        f"the lists' own numbers differ for {moved} of {len(classes)}",
    )


def _files_of_folder(root: Path, domain: str) -> dict[str, ByteRange]:
    folder = root / domain
    classes: Iterable[str] = (name for name in visible_names(folder) if (folder / name).is_dir())
    return {
        f"{domain}/{name}/{file}": FileSpan(f"{folder}/{name}/{file}")
        for name in classes
        for file in visible_names(folder / name)
    }


def _found(path: str, byte_range: ByteRange, shown: str) -> FoundImage:
    return FoundImage(PurePosixPath(path).name, byte_range, f"{shown}{path}")


FORMAT = Form(lambda dataset: (layout_of(dataset),), has_domain, read_domain)
