"""Which form of a set lies in a user's folder? The door to all readers of classification sets."""

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
    """One form in which a set is accepted.

    Attributes:
        layouts: what has to be there, for people.
        is_there: whether some of it is below a folder; quick.
        read: makes the source, or says what is wrong with it.
    """

    layouts: tuple[str, ...]
    is_there: Callable[[Path], bool]
    read: Callable[[Path, str], Source]


_FOLDERS = Form((class_folders.LAYOUT,), class_folders.is_there, class_folders.read_class_folders)
_PARQUET = Form((parquet.LAYOUT,), parquet.is_parquet_there, parquet.read_parquet)


def forms_of(dataset: str) -> tuple[Form, ...]:
    """The forms in which a set is accepted, the preferred one first.

    Raises:
        DatasetError: when there is no such classification set.
    """
    if dataset in ("imagenet", *subset.SUBSETS):
        return Form(imagenet.LAYOUT, imagenet.is_imagenet_there, imagenet.read_imagenet), _PARQUET
    if dataset == "imagenet22k":
        return (Form(wnid_tars.LAYOUT_22K, wnid_tars.is_22k_there, wnid_tars.read_22k),)
    if dataset in cifar.LAYOUT:
        is_there = partial(cifar.is_cifar_there, dataset=dataset)
        return _FOLDERS, Form((cifar.LAYOUT[dataset],), is_there, cifar.read_cifar), _PARQUET
    if dataset == "svhn":
        return _FOLDERS, Form((svhn.LAYOUT,), svhn.is_svhn_there, svhn.read_svhn), _PARQUET
    if dataset == "flowers102":
        return _FOLDERS, Form((flowers.LAYOUT,), flowers.is_flowers_there, flowers.read_flowers)
    if dataset.startswith("domainnet_"):
        is_there = partial(domainnet.is_domain_there, dataset=dataset)
        return _FOLDERS, Form((domainnet.layout_of(dataset),), is_there, domainnet.read_domain)
    raise DatasetError(
        f"There is no classification set '{dataset}'", fix="use a name that `vitpipe plan` lists"
    )


def layouts_of(dataset: str) -> tuple[str, ...]:
    """One line for people per form in which a set is accepted."""
    return tuple(layout for form in forms_of(dataset) for layout in form.layouts)


def folder_of(root: Path, dataset: str) -> Path:
    """The set's folder: root/<dataset>, or that of the larger set that it is a part of."""
    own = root / dataset
    if not own.exists() and dataset in subset.SUBSETS and (root / "imagenet").is_dir():
        return root / "imagenet"
    if not own.exists() and dataset.startswith("domainnet_") and (root / "domainnet").is_dir():
        return root / "domainnet"
    return own


def find_source(root: Path, dataset: str) -> Source:
    """Recognise the form of a classification set below `root` and check what can be checked in seconds.

    Folders go before archives where both are there, and the source's notes say so.

    Args:
        root: the folder with imagenet/, cifar10/, ...
        dataset: name in the catalogue.

    Raises:
        DatasetError: when the set is missing, incomplete, damaged or in no known form; it names the fix.
    """
    forms, folder = forms_of(dataset), folder_of(root, dataset)
    if not folder.is_dir():
        raise DatasetError(
            f"The folder of the dataset '{dataset}' is missing",
            where=folder,
            fix=f"put the set there as {_or(layouts_of(dataset))}, or take '{dataset}' out of data.sets",
        )
    there = [form for form in forms if form.is_there(folder)]
    if not there:
        raise _no_form(folder, dataset, forms)
    others = [form.layouts[0] for form in there[1:]]
    try:
        source = there[0].read(folder, dataset)
        if dataset in subset.SUBSETS:
            source = subset.take_classes(source, dataset, class_order(dataset))
    except OSError as error:
        raise DatasetError(
            f"A part of the dataset '{dataset}' cannot be read ({error.strerror or error})",
            where=error.filename or folder,
            fix="check its rights, and that nothing else changes the folder",
        ) from error
    except DatasetError as error:
        if not others:
            raise
        instead = f"; or move it away: this seems to be there, too: {others[0]}"
        raise DatasetError(error.what, where=error.where, fix=error.fix + instead) from error
    if others:
        source.notes = (*source.notes, f"not read, because another form goes before it: {'; '.join(others)}")
    return source


def _no_form(folder: Path, dataset: str, forms: tuple[Form, ...]) -> DatasetError:
    names = visible_names(folder)
    below = [name for name in names if any(form.is_there(folder / name) for form in forms)]
    fix = f"put the set there as {_or(layouts_of(dataset))}"
    if below:
        fix = f"move the content of {below[0]}/ one folder up: it looks like the set"
    content = f"but {some(names)}" if names else "it is empty"
    return DatasetError(
        f"The folder holds no known form of the dataset '{dataset}', {content}", where=folder, fix=fix
    )


def _or(layouts: tuple[str, ...]) -> str:
    return ", or as ".join(layouts)
