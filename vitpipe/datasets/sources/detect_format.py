"""Detect the format of a classification set in the user's folder; entry point to all readers."""

from __future__ import annotations

from pathlib import Path

from vitpipe.contracts.discovery import imported
from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.catalogue import DatasetFacts, class_order, facts
from vitpipe.datasets.sources.class_listing import visible_names
from vitpipe.datasets.sources.source import Form, Source
from vitpipe.datasets.sources.subset import take_classes


def forms_of(known: DatasetFacts) -> tuple[Form, ...]:
    """The formats in which a set is accepted, the preferred one first.

    Folders come before archives before parquet: folders can be read in any order and are what the user works
    with; parquet is shuffled, so its shards differ from those of the other formats.

    Raises:
        DatasetError: when it is no classification set, or there is no such reader.
    """
    if not known.has_classes:
        raise DatasetError(
            f"'{known.name}' is not a set of images with classes, but one in the layout of {known.kind}",
            fix="use a set that `vitpipe datasets` lists with training classes",
        )
    return tuple(_form(reader, known.name) for reader in known.reader)


def _form(reader: str, dataset: str) -> Form:
    """`FORMAT` of the module that a set's facts name."""
    module = f"{__package__}.{reader}"
    try:
        form: Form = imported(module, f"The reader '{reader}'").FORMAT
    except (ModuleNotFoundError, AttributeError) as error:
        raise DatasetError(
            f"The reader '{reader}' of the dataset '{dataset}' does not exist ({error})",
            where=f"datasets/facts/{dataset}.yaml",
            fix="name modules of datasets/sources/ that define FORMAT",
        ) from error
    return form


def layouts_of(known: DatasetFacts) -> tuple[str, ...]:
    """One line of text per format in which a set is accepted."""
    return tuple(layout for form in forms_of(known) for layout in form.layouts(known.name))


def folder_of(root: Path, known: DatasetFacts) -> Path:
    """The set's folder: root/<dataset>, or else the folder of the larger set that contains it."""
    own = root / known.name
    shared = [root / name for name in (known.folder, known.classes_of) if name is not None]
    return own if own.exists() else next((folder for folder in shared if folder.is_dir()), own)


def find_source(root: Path, dataset: str, known: DatasetFacts | None = None) -> Source:
    """Detect the format of a classification set below `root` and run the checks that take seconds.

    Folders take precedence over archives where both exist, and the source's notes state it.

    Args:
        root: the folder with imagenet/, cifar10/, ...
        dataset: its name.
        known: facts about it, where the catalogue has none.

    Raises:
        DatasetError: when the set is missing, incomplete, damaged or in no known format.
    """
    known = known or facts(dataset)
    forms, folder = forms_of(known), folder_of(root, known)
    if not folder.is_dir():
        raise DatasetError(
            f"The folder of the dataset '{dataset}' is missing",
            where=folder,
            fix=f"put the set there as {_or(layouts_of(known))}, or take '{dataset}' out of data.sets and of "
            "the stages that read it",
        )
    present = [form for form in forms if form.is_present(folder, dataset)]
    if not present:
        raise _unknown_format(folder, known, forms)
    others = [form.layouts(dataset)[0] for form in present[1:]]
    try:
        source = present[0].read(folder, dataset)
        if known.classes_of is not None:
            source = take_classes(source, dataset, class_order(dataset), known.classes_of)
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


def _unknown_format(folder: Path, known: DatasetFacts, forms: tuple[Form, ...]) -> DatasetError:
    names = visible_names(folder)
    below = [name for name in names if any(form.is_present(folder / name, known.name) for form in forms)]
    fix = f"put the set there as {_or(layouts_of(known))}"
    if below:
        # A common slip: the archive's own folder was unpacked into the set's folder.
        fix = f"move the content of {below[0]}/ one folder up: it looks like the set"
    content = f"only {some(names)}" if names else "it is empty"
    return DatasetError(
        f"The folder contains no known format of the dataset '{known.name}', {content}", where=folder, fix=fix
    )


def _or(layouts: tuple[str, ...]) -> str:
    return ", or as ".join(layouts)
