"""The verb `datasets`: facts about every dataset, without any data on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpipe.contracts.units import format_bytes, format_count
from vitpipe.verbs.completion import complete_dataset
from vitpipe.verbs.options import JsonOption
from vitpipe.verbs.show import print_rows

if TYPE_CHECKING:  # the catalogue imports the types of recipes, which `vitpipe --help` does not need
    from vitpipe.datasets.catalogue import Archive, DatasetFacts

_SHOWN_CLASSES = 6  # the first ones show the order: by synset id, by name, as published


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="datasets")(datasets_verb)


def datasets_verb(
    name: Annotated[
        str | None,
        typer.Argument(
            help="show all facts about one dataset, for example imagenet22k", autocompletion=complete_dataset
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the datasets; with NAME show its source formats, archives with checksums, licence and citation."""
    from vitpipe.datasets.catalogue import FACTS, facts

    if as_json:
        found: Any = _all_facts(facts(name)) if name else [asdict(known) for known in FACTS.values()]
        print(json.dumps(found, indent=2))
        return
    if name is None:
        print_rows(list_rows(), False, right=("classes", "train", "val", "size"), unbroken=("dataset",))
        return
    known = facts(name)
    title = f"{known.title} ({known.name})"
    print_rows(fact_rows(known), False, title, unbroken=("subject",), shows_header=False)
    for group, archives in archive_groups(known):
        print_rows(archive_rows(archives), False, group, right=("bytes",), unbroken=("checksum",))


def list_rows() -> list[dict[str, str]]:
    """One row per dataset."""
    from vitpipe.datasets.catalogue import FACTS

    return [
        {
            "dataset": known.name,
            "title": known.title,
            "classes": format_count(known.num_classes) if known.num_classes else "—",
            "train": format_count(known.num_train_images) if known.num_images else "—",
            "val": format_count(known.num_val_images) if known.num_images else "—",
            "size": _size(known),
            "source formats": "\n".join(known.forms),
        }
        for known in FACTS.values()
    ]


def fact_rows(known: DatasetFacts) -> list[dict[str, str]]:
    """All facts about one dataset except its archives, as pairs of subject and fact."""
    facts_by_subject = {
        "kind": _kind(known),
        "images": _images(known),
        "size": _size(known),
        "classes": _classes(known),
        "layout": known.layout,
        "source formats": "\n".join(known.forms),
        "releases": "\n".join(
            f"{r.name}: {r.title}; {r.num_train_images:,} train, {r.num_val_images:,} val, "
            f"{r.num_classes:,} classes"
            for r in known.releases
        ),
        "licence": known.licence,
        "citation": str(known.citation or ""),
        "website": known.home,
        "notes": "\n".join(known.notes),
    }
    return [{"subject": subject, "fact": fact} for subject, fact in facts_by_subject.items() if fact]


def archive_groups(known: DatasetFacts) -> list[tuple[str, tuple[Archive, ...]]]:
    """(title, archives) of the dataset, or of each of its releases; then the files inside the archives."""
    groups = [(f"Archives of {r.name}", r.archives) for r in known.releases] or [("Archives", known.archives)]
    groups.append(("Inside the archive", known.parts))
    return [(title, archives) for title, archives in groups if archives]


def archive_rows(archives: Sequence[Archive]) -> list[dict[str, str]]:
    """One row per file; a size or checksum that was not published is named `not found`."""
    return [
        {
            "file": archive.file,
            "content": archive.role,
            # Exact, not rounded: people compare it with the size of their download.
            "bytes": "not found" if archive.size_bytes is None else format_count(archive.size_bytes),
            "checksum": f"{archive.algorithm}:{archive.checksum}" if archive.checksum else "not found",
            "published by": archive.source or "",
        }
        for archive in archives
    ]


def _all_facts(known: DatasetFacts) -> dict[str, Any]:
    from vitpipe.datasets.catalogue import class_names, class_order

    return {**asdict(known), "classes": class_order(known.name), "class_names": class_names(known.name)}


def _kind(known: DatasetFacts) -> str:
    if known.classes_of:
        return f"classes of {known.classes_of}, read from its shards"
    return "images with classes, packed in shards" if known.has_classes else f"layout of {known.kind}"


def _size(known: DatasetFacts) -> str:
    if not known.size_bytes:
        return "—"
    return ("about " if known.size_is_estimate else "") + format_bytes(known.size_bytes)


def _images(known: DatasetFacts) -> str:
    if not known.num_images:
        return "counted in the folder"
    text = f"{known.num_train_images:,} train, {known.num_val_images:,} val"
    if known.num_train_sequences:
        text += f", in {known.num_train_sequences} and {known.num_val_sequences} sequences"
    return text


def _classes(known: DatasetFacts) -> str:
    from vitpipe.datasets.catalogue import class_names, class_order

    if not known.num_classes:  # DAVIS: objects without classes; own sets: as their folders have them
        return known.class_order
    keys, names = class_order(known.name), class_names(known.name)
    shown = [key if key == name else f"{key} {name}" for key, name in zip(keys, names, strict=True)]
    first = f": {', '.join(shown[:_SHOWN_CLASSES])}, ..." if shown else ""
    return f"{known.num_classes:,}{first}\n{known.class_order}"
