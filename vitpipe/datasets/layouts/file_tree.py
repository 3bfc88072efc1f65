"""A set's files by name, whether they lie in folders, in the original zip archives, or in both."""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.archives import ZipEntry, safe_zip_members
from vitpipe.datasets.sources.byte_ranges import ByteRange, FileSpan, ZipMember

_CHUNK = 2**20


class FileTree(ABC):
    """Files and folders by names with slashes, relative to the set. Hidden ones are passed over."""

    @abstractmethod
    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names in a folder that end in `suffix`, sorted; empty when there is no such folder."""

    @abstractmethod
    def is_dir(self, name: str) -> bool:
        """Whether it is a folder."""

    @abstractmethod
    def is_file(self, name: str) -> bool:
        """Whether it is a file."""

    @abstractmethod
    def size_bytes(self, name: str) -> int:
        """Size of a file."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """A file, opened for reading."""

    @abstractmethod
    def place(self, name: str) -> ByteRange:
        """Where a file is, for another process."""

    @abstractmethod
    def where(self, name: str) -> str:
        """What a person would call it."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a file, piece by piece.

        Raises:
            DatasetError: when it cannot be read to its end.
        """
        try:
            with self.open(name) as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DatasetError(
                f"A file cannot be read ({' '.join(str(error).split()) or type(error).__name__})",
                where=self.where(name),
                fix="get this file anew; of an archive, compare the checksum with the published one",
            ) from error

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            DatasetError: when it cannot be read to its end.
        """
        return b"".join(self.chunks(name))


class FolderTree(FileTree):
    """Files in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names in a folder that end in `suffix`, sorted."""
        if not self.is_dir(folder):
            return []
        with os.scandir(self.root / folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
        return sorted(name for name in names if name.endswith(suffix))

    def is_dir(self, name: str) -> bool:
        """Whether it is a folder."""
        return (self.root / name).is_dir()

    def is_file(self, name: str) -> bool:
        """Whether it is a file."""
        return (self.root / name).is_file()

    def size_bytes(self, name: str) -> int:
        """Size of a file."""
        return (self.root / name).stat().st_size

    def open(self, name: str) -> IO[bytes]:
        """A file, opened for reading."""
        return (self.root / name).open("rb")

    def place(self, name: str) -> ByteRange:
        """The file itself."""
        return FileSpan(str(self.root / name))

    def where(self, name: str) -> str:
        """Its path."""
        return str(self.root / name)


class ZipTree(FileTree):
    """Files in zip archives, read in their place.

    Args:
        archives: later ones add to earlier ones.
        strip: folder that holds everything inside the archives, with its slash; what lies beside it is
            passed over.

    Raises:
        DatasetError: when an archive must not be trusted or is damaged.
    """

    def __init__(self, archives: Sequence[Path], strip: str = "") -> None:
        self.archives, self.strip = tuple(archives), strip
        self._files: dict[str, tuple[Path, ZipEntry]] = {}
        self._folders: dict[str, set[str]] = {"": set()}
        self._opened: dict[Path, zipfile.ZipFile] = {}
        for path in archives:
            for entry in safe_zip_members(path):
                name = entry.name.removeprefix("./")
                if name.startswith(strip):
                    self._add(name.removeprefix(strip), path, entry)
        self._sorted: dict[str, list[str]] = {}

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names in a folder that end in `suffix`, sorted."""
        if folder not in self._sorted:
            self._sorted[folder] = sorted(self._folders.get(folder, ()))
        return [name for name in self._sorted[folder] if name.endswith(suffix)]

    def is_dir(self, name: str) -> bool:
        """Whether it is a folder with something in it."""
        return name in self._folders

    def is_file(self, name: str) -> bool:
        """Whether it is a file."""
        return name in self._files

    def size_bytes(self, name: str) -> int:
        """Size of a file, unpacked."""
        return self._files[name][1].size_bytes

    def open(self, name: str) -> IO[bytes]:
        """A file, opened for reading; its checksum is compared at its end."""
        path, entry = self._files[name]
        if path not in self._opened:
            self._opened[path] = zipfile.ZipFile(path)
        return self._opened[path].open(entry.name)

    def place(self, name: str) -> ByteRange:
        """The member of the archive."""
        path, entry = self._files[name]
        return ZipMember(str(path), entry.name, entry.crc32)

    def where(self, name: str) -> str:
        """The archive's path and the name inside."""
        if name in self._files:
            path, entry = self._files[name]
            return f"{path}: {entry.name}"
        return f"{', '.join(str(path) for path in self.archives)}: {self.strip}{name}"

    def _add(self, name: str, path: Path, entry: ZipEntry) -> None:
        if any(part.startswith(".") for part in name.split("/")):
            return
        self._files[name] = (path, entry)
        while name:
            folder, _, last = name.rpartition("/")
            siblings = self._folders.setdefault(folder, set())
            if last in siblings:
                return
            siblings.add(last)
            name = folder


class LayeredTree(FileTree):
    """Several trees on top of each other; a file or folder is that of the first tree that has it."""

    def __init__(self, layers: Sequence[FileTree]) -> None:
        self.layers = tuple(layers)

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names in the first tree's folder that end in `suffix`, sorted."""
        return self._layer_of(folder).names(folder, suffix)

    def is_dir(self, name: str) -> bool:
        """Whether it is a folder of any tree."""
        return any(layer.is_dir(name) for layer in self.layers)

    def is_file(self, name: str) -> bool:
        """Whether it is a file of any tree."""
        return any(layer.is_file(name) for layer in self.layers)

    def size_bytes(self, name: str) -> int:
        """Size of a file."""
        return self._layer_of(name).size_bytes(name)

    def open(self, name: str) -> IO[bytes]:
        """A file, opened for reading."""
        return self._layer_of(name).open(name)

    def place(self, name: str) -> ByteRange:
        """Where the file is."""
        return self._layer_of(name).place(name)

    def where(self, name: str) -> str:
        """What a person would call it."""
        return self._layer_of(name).where(name)

    def _layer_of(self, name: str) -> FileTree:
        found = (layer for layer in self.layers if layer.is_file(name) or layer.is_dir(name))
        return next(found, self.layers[0])


@dataclass(frozen=True)
class OriginalArchive:
    """An archive as it is published.

    Attributes:
        file: its name.
        parts: what it holds; it is opened when one of them is not there as a file or folder.
        strip: folder around everything in it, with its slash.
    """

    file: str
    parts: tuple[str, ...]
    strip: str = ""


@dataclass(frozen=True)
class DenseLayout:
    """A dense set in its own layout.

    Attributes:
        counts: numbers of pictures, annotations, sequences.
        files: every file that belongs to it, relative to the set, sorted.
        tree: what reads them.
        notes: what is there besides and is not used.
    """

    dataset: str
    root: Path
    classes: tuple[str, ...]
    counts: dict[str, int]
    files: tuple[str, ...]
    tree: FileTree
    notes: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether all of it lies in folders, to be used in its place."""
        return isinstance(self.tree, FolderTree)

    @property
    def form(self) -> str:
        """What was found, for people."""
        layers = self.tree.layers if isinstance(self.tree, LayeredTree) else ()
        archives = [path.name for layer in layers if isinstance(layer, ZipTree) for path in layer.archives]
        return f"archives ({', '.join(archives)})" if archives else "folders"


def open_tree(root: Path, dataset: str, archives: Iterable[OriginalArchive]) -> tuple[Path, FileTree]:
    """A set's folder, and its original archives for what is not unpacked.

    Returns:
        The folder that holds the set's parts, which may be the one that was around them in the archive; and
        what reads them.

    Raises:
        DatasetError: when the folder is missing, or an archive must not be trusted or is damaged.
    """
    archives = tuple(archives)
    if not root.is_dir():
        files = " and ".join(archive.file for archive in archives)
        raise DatasetError(
            f"A folder of the dataset '{dataset}' is missing",
            where=root,
            fix=f"put {files} there, or their content, or take '{dataset}' out of data.sets",
        )
    folder = FolderTree(root)
    inner = {archive.strip for archive in archives if folder.is_dir(archive.strip)} - {""}
    if inner and not any(folder.is_dir(part) for archive in archives for part in archive.parts):
        folder = FolderTree(root / inner.pop())
    layers: list[FileTree] = [folder]
    for archive in archives:
        unpacked = all(folder.is_dir(part) or folder.is_file(part) for part in archive.parts)
        if not unpacked and (root / archive.file).is_file():
            layers.append(ZipTree([root / archive.file], archive.strip))
    return folder.root, LayeredTree(layers) if len(layers) > 1 else folder


def need_folder(tree: FileTree, name: str, dataset: str, fix: str) -> None:
    """Refuse a set without a folder.

    Raises:
        DatasetError: when it is not there.
    """
    if not tree.is_dir(name):
        raise DatasetError(f"A folder of the dataset '{dataset}' is missing", where=tree.where(name), fix=fix)


def none_missing(wanted: Iterable[str], present: Iterable[str], where: str, fix: str) -> None:
    """Refuse a folder without some of the wanted files.

    Raises:
        DatasetError: naming the first of them.
    """
    present = set(present)
    missing = [name for name in wanted if name not in present]
    if missing:
        raise DatasetError(f"{len(missing)} files are missing: {some(missing)}", where=where, fix=fix)


def spread(names: Sequence[str], number: int | None) -> list[str]:
    """So many of them, evenly spread from the first to the last; all for None."""
    if number is None or number >= len(names):
        return list(names)
    return [names[position * len(names) // number] for position in range(number)]
