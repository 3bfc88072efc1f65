"""Detect the format of a classification set in the user's folder; entry point to all readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.catalogue import class_order
from vitpipe.datasets.sources import (
    cifar,
    class_folders,
    domainnet,
    flowers,
    imagenet,
    parquet,
    subset,
    svhn,
    wnid_tars,
)
from vitpipe.datasets.sources.class_listing import visible_names
from vitpipe.datasets.sources.source import Source


@dataclass(frozen=True)
class Form:
    """One format in which a set is accepted.

    Attributes:
        layouts: the required files, as text.
        is_present: whether a folder contains any of them; fast.
        read: makes the source; raises a `DatasetError` that says what is wrong with it.
    """

    layouts: tuple[str, ...]
    is_present: Callable[[Path], bool]
    read: Callable[[Path, str], Source]


_FOLDERS = Form((class_folders.LAYOUT,), class_folders.has_class_folders, class_folders.read_class_folders)
_PARQUET = Form((parquet.LAYOUT,), parquet.has_parquet, parquet.read_parquet)


def forms_of(dataset: str) -> tuple[Form, ...]:
    """The formats in which a set is accepted, the preferred one first.

    Raises:
        DatasetError: when there is no such classification set.
    """
    # Folders before archives before parquet: folders can be read in any order and are what the user works
    # with; parquet is shuffled, so its shards differ from those of the other formats.
    if dataset in ("imagenet", *subset.SUBSETS):
        return Form(imagenet.LAYOUT, imagenet.has_imagenet, imagenet.read_imagenet), _PARQUET
    if dataset == "imagenet22k":
        return (Form(wnid_tars.LAYOUT_22K, wnid_tars.has_22k, wnid_tars.read_22k),)
    if dataset in cifar.LAYOUT:
        is_present = partial(cifar.has_cifar, dataset=dataset)
        return _FOLDERS, Form((cifar.LAYOUT[dataset],), is_present, cifar.read_cifar), _PARQUET
    if dataset == "svhn":
        return _FOLDERS, Form((svhn.LAYOUT,), svhn.has_svhn, svhn.read_svhn), _PARQUET
    if dataset == "flowers102":
        return _FOLDERS, Form((flowers.LAYOUT,), flowers.has_flowers, flowers.read_flowers)
    if dataset.startswith("domainnet_"):
        is_present = partial(domainnet.has_domain, dataset=dataset)
        return _FOLDERS, Form((domainnet.layout_of(dataset),), is_present, domainnet.read_domain)
    raise DatasetError(
        f"There is no classification set '{dataset}'", fix="use a name that `vitpipe datasets` lists"
    )


def layouts_of(dataset: str) -> tuple[str, ...]:
    """One line of text per format in which a set is accepted."""
    return tuple(layout for form in forms_of(dataset) for layout in form.layouts)


def folder_of(root: Path, dataset: str) -> Path:
    """The set's folder: root/<dataset>, or else the folder of the larger set that contains it."""
    own = root / dataset
    if not own.exists() and dataset in subset.SUBSETS and (root / "imagenet").is_dir():
        return root / "imagenet"
    if not own.exists() and dataset.startswith("domainnet_") and (root / "domainnet").is_dir():
        return root / "domainnet"
    return own


def find_source(root: Path, dataset: str) -> Source:
    """Detect the format of a classification set below `root` and run the checks that take seconds.

    Folders take precedence over archives where both exist, and the source's notes state it.

    Args:
        root: the folder with imagenet/, cifar10/, ...
        dataset: name in the catalogue.

    Raises:
        DatasetError: when the set is missing, incomplete, damaged or in no known format.
    """
    forms, folder = forms_of(dataset), folder_of(root, dataset)
    if not folder.is_dir():
        raise DatasetError(
            f"The folder of the dataset '{dataset}' is missing",
            where=folder,
            fix=f"put the set there as {_or(layouts_of(dataset))}, or take '{dataset}' out of data.sets",
        )
    present = [form for form in forms if form.is_present(folder)]
    if not present:
        raise _unknown_format(folder, dataset, forms)
    others = [form.layouts[0] for form in present[1:]]
    try:
        source = present[0].read(folder, dataset)
        if dataset in subset.SUBSETS:
            source = subset.take_classes(source, dataset, class_order(dataset))
    # The readers let errors of listing pass: permissions, a network file system that is gone.
    except OSError as error:
        raise DatasetError(
            f"A part of the dataset '{dataset}' cannot be read ({error.strerror or error})",
            where=error.filename or folder,
            fix="check its permissions, and that nothing else changes the folder",
        ) from error
    except DatasetError as error:
        if not others:
            raise
        # No silent fallback to the other format: a half unpacked folder would go unnoticed.
        instead = f"; or move it away, to read in its place: {others[0]}"
        raise DatasetError(error.what, where=error.where, fix=error.fix + instead) from error
    if others:
        source.notes = (
            *source.notes,
            f"not read, because another format takes precedence: {'; '.join(others)}",
        )
    return source


def _unknown_format(folder: Path, dataset: str, forms: tuple[Form, ...]) -> DatasetError:
    names = visible_names(folder)
    below = [name for name in names if any(form.is_present(folder / name) for form in forms)]
    fix = f"put the set there as {_or(layouts_of(dataset))}"
    if below:
        # A common slip: the archive's own folder was unpacked into the set's folder.
        fix = f"move the content of {below[0]}/ one folder up: it looks like the set"
    content = f"only {some(names)}" if names else "it is empty"
    return DatasetError(
        f"The folder contains no known format of the dataset '{dataset}', {content}", where=folder, fix=fix
    )


def _or(layouts: tuple[str, ...]) -> str:
    return ", or as ".join(layouts)
