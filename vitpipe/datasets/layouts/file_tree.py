"""Access to a set's files by name, in folders, in the original zip archives, or in a mixture of both."""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vitpipe.contracts.errors import DatasetError, reason_of, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.archives import ZipEntry, safe_zip_members

if TYPE_CHECKING:  # image_headers imports this module
    from vitpipe.datasets.layouts.image_headers import Look

_CHUNK = 2**20  # bytes per read
Pictures = Callable[[Sequence[str], str, Callable[[str], bytes]], list[str]]


class FileTree(ABC):
    """Files and folders by slash-separated names relative to the set's folder. Hidden ones are skipped."""

    @abstractmethod
    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names in a folder that end in `suffix`, sorted; empty when the folder does not exist."""

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
    def where(self, name: str) -> str:
        """Display path, for messages."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file in chunks.

        Raises:
            DatasetError: when it cannot be read completely.
        """
        try:
            with self.open(name) as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DatasetError(
                f"A file cannot be read ({reason_of(error)})",
                where=self.where(name),
                fix="download this file again; for an archive, compare its checksum with the published one",
            ) from error

    def read(self, name: str) -> bytes:
        """Read the content of a file.

        Raises:
            DatasetError: when it cannot be read completely.
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

    def where(self, name: str) -> str:
        """Its path."""
        return str(self.root / name)


class ZipTree(FileTree):
    """Files in zip archives, read in place.

    Args:
        archives: their files are merged; a later archive wins.
        strip: top folder of the archives, with a slash at its end; members outside of it are ignored.

    Raises:
        DatasetError: when an archive is refused or damaged.
    """

    def __init__(self, archives: Sequence[Path], strip: str = "") -> None:
        self.archives, self.strip = tuple(archives), strip
        self._files: dict[str, tuple[Path, ZipEntry]] = {}
        self._folders: dict[str, set[str]] = {"": set()}
        self._opened: dict[Path, zipfile.ZipFile] = {}
        for path in archives:
            for entry in safe_zip_members(path):
                # Outside of the top folder are files such as the __MACOSX/ that macOS adds.
                name = entry.name.removeprefix("./")
                if name.startswith(strip):
                    self._add(name.removeprefix(strip), path, entry)
        self._sorted: dict[str, list[str]] = {}

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names in a folder that end in `suffix`, sorted."""
        # Sorted once per folder: DAVIS asks for each of its 180 folders several times, COCO has 118,287
        # names in one.
        if folder not in self._sorted:
            self._sorted[folder] = sorted(self._folders.get(folder, ()))
        return [name for name in self._sorted[folder] if name.endswith(suffix)]

    def is_dir(self, name: str) -> bool:
        """Whether it is a folder with a file below it."""
        return name in self._folders

    def is_file(self, name: str) -> bool:
        """Whether it is a file."""
        return name in self._files

    def size_bytes(self, name: str) -> int:
        """Size of a file, decompressed."""
        return self._files[name][1].size_bytes

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; `zipfile` compares its CRC-32 at the end."""
        # Kept open for the life of the tree: opening parses the whole directory of the archive.
        path, entry = self._files[name]
        if path not in self._opened:
            self._opened[path] = zipfile.ZipFile(path)
        return self._opened[path].open(entry.name)

    def where(self, name: str) -> str:
        """Path of the archive and name of the member."""
        if name in self._files:
            path, entry = self._files[name]
            return f"{path}: {entry.name}"
        return f"{', '.join(str(path) for path in self.archives)}: {self.strip}{name}"

    def _add(self, name: str, path: Path, entry: ZipEntry) -> None:
        if any(part.startswith(".") for part in name.split("/")):
            return
        self._files[name] = (path, entry)
        # Zips need not list their folders, so these follow from the names of the files. A known entry
        # ends the walk, because its parents are known as well.
        while name:
            folder, _, last = name.rpartition("/")
            siblings = self._folders.setdefault(folder, set())
            if last in siblings:
                return
            siblings.add(last)
            name = folder


class LayeredTree(FileTree):
    """Several trees in order of precedence: a file or folder is that of the first tree that has it.

    Folders are not merged, so an incompletely unpacked folder is reported instead of completed from its
    archive.
    """

    def __init__(self, layers: Sequence[FileTree]) -> None:
        self.layers = tuple(layers)

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names in the folder of the first tree that has it, ending in `suffix`, sorted."""
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

    def where(self, name: str) -> str:
        """What a person would call it."""
        return self._layer_of(name).where(name)

    def _layer_of(self, name: str) -> FileTree:
        found = (layer for layer in self.layers if layer.is_file(name) or layer.is_dir(name))
        # The folder tree for missing names, so that messages name the path where the file should be.
        return next(found, self.layers[0])


@dataclass(frozen=True)
class Remark:
    """A finding that stops nothing: what was repaired, or is left out of training.

    Attributes:
        what: with its count and examples, one sentence without a full stop.
        where: the file or folder.
        fix: an imperative; empty if there is nothing to do.
    """

    what: str
    where: str = ""
    fix: str = ""


@dataclass(frozen=True)
class OriginalArchive:
    """An archive as published.

    Attributes:
        file: its name.
        parts: files or folders in it; it is opened when one of them is not unpacked.
        strip: its top folder, with a slash at its end; empty if it has none.
    """

    file: str
    parts: tuple[str, ...]
    strip: str = ""


@dataclass(frozen=True)
class DenseLayout:
    """A dense set in its own layout.

    Attributes:
        kind: its layout, by the module that verified it.
        counts: numbers of images, annotations, sequences by name.
        files: every file that belongs to it, relative to the set, sorted.
        tree: access to them.
        notes: files that were found and are not used.
        remarks: what was repaired in the annotations, or is left out.
        stated_sizes: (width, height) of an image by its file, where annotations state it.
    """

    dataset: str
    kind: str
    root: Path
    classes: tuple[str, ...]
    counts: dict[str, int]
    files: tuple[str, ...]
    tree: FileTree
    notes: tuple[str, ...] = ()
    remarks: tuple[Remark, ...] = ()
    stated_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether all files are in folders, so that the set can be used in place."""
        return isinstance(self.tree, FolderTree)

    @property
    def form(self) -> str:
        """Description of the format that was found."""
        layers = self.tree.layers if isinstance(self.tree, LayeredTree) else ()
        archives = [path.name for layer in layers if isinstance(layer, ZipTree) for path in layer.archives]
        return f"archives ({', '.join(archives)})" if archives else "folders"


@dataclass(frozen=True)
class Layout:
    """A layout of dense sets: `LAYOUT` of a module of this package.

    Attributes:
        verify: folder and name of a set > its content; raises a `DatasetError` that says what is wrong.
        look_into: inspects the images themselves, a number of them or all.
        pictures: the files of a set, `train` or `val`, and a function that reads one of them > those that are
            pictures of this split, in their order; without it stages cannot read the pictures alone.
    """

    verify: Callable[[Path, str], DenseLayout]
    look_into: Callable[[DenseLayout, int | None], Look]
    pictures: Pictures | None = None


def open_tree(root: Path, dataset: str, archives: Iterable[OriginalArchive]) -> tuple[Path, FileTree]:
    """Open a set's folder, and its original archives for the parts that are not unpacked.

    Returns:
        The folder with the set's parts, which may be the top folder of the archive below `root`; and the
        access to its files.

    Raises:
        DatasetError: when the folder is missing, or an archive is refused or damaged.
    """
    archives = tuple(archives)
    if not root.is_dir():
        files = " and ".join(archive.file for archive in archives)
        raise DatasetError(
            f"A folder of the dataset '{dataset}' is missing",
            where=root,
            fix=f"put {files} or their content there, or remove '{dataset}' from data.sets",
        )
    folder = FolderTree(root)
    # Unpacked with or without the top folder of the archive: both are common.
    inner = {archive.strip for archive in archives if folder.is_dir(archive.strip)} - {""}
    if inner and not any(folder.is_dir(part) for archive in archives for part in archive.parts):
        folder = FolderTree(root / inner.pop())
    layers: list[FileTree] = [folder]
    for archive in archives:
        # An unpacked part makes its archive unnecessary: then it need not be read, nor even be valid.
        unpacked = all(folder.is_dir(part) or folder.is_file(part) for part in archive.parts)
        if not unpacked and (root / archive.file).is_file():
            layers.append(ZipTree([root / archive.file], archive.strip))
    return folder.root, LayeredTree(layers) if len(layers) > 1 else folder


def require_folder(tree: FileTree, name: str, dataset: str, fix: str) -> None:
    """Check that a folder exists.

    Raises:
        DatasetError: when it is missing.
    """
    if not tree.is_dir(name):
        raise DatasetError(f"A folder of the dataset '{dataset}' is missing", where=tree.where(name), fix=fix)


def require_files(required: Iterable[str], present: Iterable[str], where: str, fix: str) -> None:
    """Check that all required files are present.

    Raises:
        DatasetError: naming the first missing ones.
    """
    present = set(present)
    missing = [name for name in required if name not in present]
    if missing:
        raise DatasetError(
            f"{counted(len(missing), 'file is', 'files are')} missing: {some(missing)}", where=where, fix=fix
        )


def evenly_spaced(names: Sequence[str], number: int | None) -> list[str]:
    """`number` of the names, evenly spaced from the first on; all of them for None."""
    if number is None or number >= len(names):
        return list(names)
    return [names[position * len(names) // number] for position in range(number)]
