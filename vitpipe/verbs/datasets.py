"""The verb `datasets`: what is known about every dataset before any data is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from vitpipe.contracts.units import format_bytes
from vitpipe.datasets.catalogue import FACTS, Archive, DatasetFacts, class_names, class_order, facts
from vitpipe.verbs.show import print_rows

_SHOWN_CLASSES = 6


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="datasets")(datasets_verb)


def datasets_verb(
    name: Annotated[
        str | None, typer.Argument(help="everything about one set, for example imagenet22k")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """List the datasets; with NAME show its forms, archives with checksums, licence and citation."""
    if as_json:
        found: Any = _whole(facts(name)) if name else [asdict(known) for known in FACTS.values()]
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
    return [
        {
            "dataset": known.name,
            "title": known.title,
            "classes": f"{known.num_classes:,}" if known.num_classes else "—",
            "train": f"{known.num_train_images:,}",
            "val": f"{known.num_val_images:,}",
            "size": _size(known),
            "accepted forms": "\n".join(known.forms),
        }
        for known in FACTS.values()
    ]


def fact_rows(known: DatasetFacts) -> list[dict[str, str]]:
    """Everything about one dataset but its archives, as pairs of subject and fact."""
    facts_by_subject = {
        "images": _images(known),
        "size": _size(known),
        "classes": _classes(known),
        "layout": known.layout,
        "accepted forms": "\n".join(known.forms),
        "releases": "\n".join(
            f"{r.name}: {r.title}; {r.num_train_images:,} train, {r.num_val_images:,} val, "
            f"{r.num_classes:,} classes"
            for r in known.releases
        ),
        "licence": known.licence,
        "cite": str(known.citation),
        "home": known.home,
        "notes": "\n".join(known.notes),
    }
    return [{"subject": subject, "fact": fact} for subject, fact in facts_by_subject.items() if fact]


def archive_groups(known: DatasetFacts) -> list[tuple[str, tuple[Archive, ...]]]:
    """(title, archives) of the set, or of each of its releases; then what is inside the archives."""
    groups = [(f"Archives of {r.name}", r.archives) for r in known.releases] or [("Archives", known.archives)]
    groups.append(("Inside the archive", known.parts))
    return [(title, archives) for title, archives in groups if archives]


def archive_rows(archives: Sequence[Archive]) -> list[dict[str, str]]:
    """One row per file; what nobody published is said."""
    return [
        {
            "file": archive.file,
            "holds": archive.role,
            "bytes": "not found" if archive.size_bytes is None else f"{archive.size_bytes:,}",
            "checksum": f"{archive.algorithm}:{archive.checksum}" if archive.checksum else "not found",
            "published by": archive.source or "",
        }
        for archive in archives
    ]


def _whole(known: DatasetFacts) -> dict[str, Any]:
    return {**asdict(known), "classes": class_order(known.name), "class_names": class_names(known.name)}


def _size(known: DatasetFacts) -> str:
    return ("about " if known.size_is_estimate else "") + format_bytes(known.size_bytes)


def _images(known: DatasetFacts) -> str:
    text = f"{known.num_train_images:,} train, {known.num_val_images:,} val"
    if known.num_train_sequences:
        text += f", in {known.num_train_sequences} and {known.num_val_sequences} sequences"
    return text


def _classes(known: DatasetFacts) -> str:
    if not known.num_classes:
        return known.class_order
    keys, names = class_order(known.name), class_names(known.name)
    shown = [key if key == name else f"{key} {name}" for key, name in zip(keys, names, strict=True)]
    first = f": {', '.join(shown[:_SHOWN_CLASSES])}, ..." if shown else ""
    return f"{known.num_classes:,}{first}\n{known.class_order}"
