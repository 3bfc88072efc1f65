"""DAVIS 2017 at 480p (Pont-Tuset et al., 2017): the content of DAVIS-2017-trainval-480p.zip, or that zip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.contracts.units import counted
from vitpipe.datasets.layouts.file_tree import (
    DenseLayout,
    FileTree,
    Layout,
    OriginalArchive,
    evenly_spaced,
    open_tree,
    require_files,
    require_folder,
)
from vitpipe.datasets.layouts.image_headers import Look, label_maps_of, sizes_of

_ZIP = "DAVIS-2017-trainval-480p.zip"
_AGAIN = f"unpack {_ZIP} again"
_FRAMES, _LABELS = "JPEGImages/480p", "Annotations/480p"
ARCHIVES = (OriginalArchive(_ZIP, ("JPEGImages", "Annotations", "ImageSets"), strip="DAVIS/"),)


def verify_davis(root: Path, dataset: str = "davis") -> DenseLayout:
    """Verify a DAVIS 2017 folder at 480p: the lists, and frames and label maps of every listed sequence.

    Raises:
        DatasetError: a missing folder or list, a listed sequence without frames or label maps, frames and
            label maps that do not pair, a gap in the frame numbers, an archive that is refused.
    """
    root, tree = open_tree(root, dataset, ARCHIVES)
    counts: dict[str, int] = {}
    files: list[str] = []
    for split in ("train", "val"):
        listing = f"ImageSets/2017/{split}.txt"
        if not tree.is_file(listing):
            raise DatasetError(
                "The list of sequences is missing",
                where=tree.where(listing),
                fix=f"put {_ZIP} into the set's folder, or {_AGAIN}",
            )
        sequences = listed_sequences(tree.read(listing), tree.where(listing))
        if split == "val" and not sequences:
            raise DatasetError("The list names no sequence", where=tree.where(listing), fix=_AGAIN)
        frames = [frame for name in sequences for frame in _frames_of(tree, name, listing)]
        files += [f"{_FRAMES}/{frame}.jpg" for frame in frames]
        files += [f"{_LABELS}/{frame}.png" for frame in frames]
        counts[f"{split}_sequences"], counts[f"{split}_images"] = len(sequences), len(frames)
        files.append(listing)
    listed = {name.split("/")[2] for name in files if name.startswith(_FRAMES)}
    # The trainval archive has exactly the listed ones; others may be of test-dev, unpacked into the same
    # folder.
    extra = [name for name in tree.names(_FRAMES) if name not in listed]
    notes = (
        (f"{counted(len(extra), 'sequence is', 'sequences are')} not listed: {some(extra)}",) if extra else ()
    )
    return DenseLayout(dataset, "davis", root, (), counts, tuple(sorted(files)), tree, notes)


def listed_sequences(content: bytes, where: str | Path) -> list[str]:
    """The names in a list of sequences, one per line.

    Args:
        content: of the file.
        where: the file, for messages.

    Raises:
        DatasetError: when a name stands there twice, whose objects would count twice.
    """
    # Editors on Windows begin a file with a byte order mark.
    lines = content.decode("utf-8-sig", "replace").splitlines()
    names = [name for line in lines if (name := line.strip())]
    twice = sorted(name for name, number in Counter(names).items() if number > 1)
    if twice:
        raise DatasetError(
            f"The list names a sequence more than once: {some(twice)}", where=where, fix="list each one once"
        )
    return names


def look_into_davis(layout: DenseLayout, number: int | None) -> Look:
    """Compare label maps with frames, and frames with the first of their sequence, for `number` or all."""
    frames = [name for name in layout.files if name.startswith(_FRAMES)]
    looked = evenly_spaced(frames, number)
    label_names = [_label_of(name) for name in looked]
    # All frames of a sequence have one size: masks are propagated from frame to frame on one grid.
    # Its objects are those of its first label map.
    firsts = dict[str, str]()
    for name in frames:
        firsts.setdefault(name.rpartition("/")[0], name)
    first_names = list(firsts.values())
    sizes = dict(zip(firsts, sizes_of(layout.tree, first_names), strict=True))
    objects = dict(
        zip(firsts, label_maps_of(layout.tree, [_label_of(name) for name in first_names]), strict=True)
    )
    broken, wrong, odd = [], [], []
    pairs = zip(sizes_of(layout.tree, looked), label_maps_of(layout.tree, label_names), strict=True)
    for name, label_name, (size, labels) in zip(looked, label_names, pairs, strict=True):
        sequence = name.rpartition("/")[0]
        if isinstance(size, str):
            broken.append(f"{name} ({size})")
        elif isinstance(labels, str):
            broken.append(f"{label_name} ({labels})")
        elif labels.size != size:
            wrong.append("{} ({}x{} instead of {}x{})".format(label_name, *labels.size, *size))
        elif size != sizes[sequence]:
            odd.append(name)
    maps = {name: found for name, found in objects.items() if not isinstance(found, str)}
    empty = [name for name, found in maps.items() if not set(found.values) - {0}]
    binary = [name for name, found in maps.items() if {255} <= set(found.values) <= {0, 255}]
    problems = [
        (broken, "files cannot be used", f"{_AGAIN}, with one-channel label maps"),
        (wrong, "label maps have another size than their frames", f"use both from {_ZIP}, at 480p"),
        (odd, "frames have another size than the first of their sequence", f"use all frames from {_ZIP}"),
        (empty, "sequences have no object in their first label map", f"{_AGAIN}: its objects are propagated"),
        (
            binary,
            "sequences have labels 0 and 255 only, as the masks of DAVIS 2016",
            "use the label maps of DAVIS 2017, which number the objects from 1",
        ),
    ]
    found = (
        DatasetError(f"{len(names)} {what}: {some(names)}", where=layout.root, fix=fix)
        for names, what, fix in problems
        if names
    )
    return Look(len(looked), tuple(found))


def _label_of(frame: str) -> str:
    return f"{_LABELS}{frame.removeprefix(_FRAMES)[:-4]}.png"


def _frames_of(tree: FileTree, sequence: str, listing: str) -> list[str]:
    """`<sequence>/<number>` of every frame of a sequence, after all checks."""
    frames, labels = f"{_FRAMES}/{sequence}", f"{_LABELS}/{sequence}"
    # An untrusted list must not lead out of the folder.
    if "/" in sequence or sequence.startswith("."):
        raise DatasetError(
            f"The list contains '{sequence}', which is not the name of a sequence",
            where=tree.where(listing),
            fix=_AGAIN,
        )
    for folder in (frames, labels):
        require_folder(tree, folder, "davis", f"{_AGAIN}, or remove '{sequence}' from {listing}")
    frame_names, label_names = tree.names(frames, ".jpg"), tree.names(labels, ".png")
    require_files([f"{name[:-4]}.png" for name in frame_names], label_names, tree.where(labels), _AGAIN)
    require_files([f"{name[:-4]}.jpg" for name in label_names], frame_names, tree.where(frames), _AGAIN)
    stems = [name[:-4] for name in frame_names]
    if not stems:
        raise DatasetError("There are no frames", where=tree.where(frames), fix=_AGAIN)
    # A frame that is missing together with its label map is no mismatch, but propagation would skip it.
    # Frames missing at the end cannot be detected: the lists give no lengths.
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
    gaps = [f"after {first:05d}" for first, then in pairwise(sorted(numbers)) if then > first + 1]
    if gaps:
        raise DatasetError(
            f"Frame numbers have gaps: {some(gaps)}",
            where=tree.where(frames),
            fix=_AGAIN,
        )
    return [f"{sequence}/{stem}" for stem in stems]


def pictures_of_davis(files: Sequence[str], split: str, read: Callable[[str], bytes]) -> list[str]:
    """The frames of a split's sequences, see `Layout.pictures`."""
    listing = f"ImageSets/2017/{split}.txt"
    sequences = set(listed_sequences(read(listing), listing))
    return [name for name in files if name.startswith(f"{_FRAMES}/") and name.split("/")[2] in sequences]


LAYOUT = Layout(verify_davis, look_into_davis, pictures_of_davis)
