"""Facts about the datasets, known before any data is there. Needs neither torch nor data.

The facts lie in `facts.yaml` beside this file, each checksum and size with the place where it was
published. The file is read when the first fact is asked for, and once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from vitpipe.config.data import DENSE_SETS, EMBEDDED_SETS, SHARD_SETS, DataConfig, EmbeddedConfig
from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.bundled import bundled_file


@dataclass(frozen=True)
class Archive:
    """One released file.

    Attributes:
        role: what is in it, for people.
        size_bytes: None where it was not found.
        checksum: hex digits; None where none was published.
        source: where checksum and size were published.
    """

    file: str
    role: str
    size_bytes: int | None
    algorithm: Literal["md5", "sha256"] | None
    checksum: str | None
    source: str | None


@dataclass(frozen=True)
class Release:
    """One of several releases of the same set.

    Attributes:
        class_file: where its class keys are, see `DatasetFacts`.
    """

    name: str
    title: str
    num_train_images: int
    num_val_images: int
    num_classes: int
    class_file: str | None
    archives: tuple[Archive, ...]


@dataclass(frozen=True)
class Citation:
    """Whom to cite."""

    authors: str
    title: str
    venue: str
    year: int

    def __str__(self) -> str:
        """As one line of a bibliography."""
        return f"{self.authors}, {self.title}, {self.venue}, {self.year}"


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about one dataset. For DAVIS images are frames at 480p and there are no classes.

    Attributes:
        size_bytes: the released image archives; an estimate for embedded data and where it says so.
        layout: the folders it must have, as one line for people.
        forms: everything that the prepare stage accepts, one line for people each.
        class_order: where the order of the classes comes from, for people.
        class_file: file with the class keys in order: `names/FILE` of this package, `timm:FILE` of the
            installed timm, or `digits` and `numbers`, which need none; None when the folders found decide.
        names_file: names for people, where the keys are not names.
        archives: the released files of the set (of its first release, if there are several).
        parts: what is inside an archive and has a checksum of its own.
        typical_short_side: pixels, for estimates.
        array_side: pixels, of a set that is released as numbers instead of image files.
    """

    name: str
    title: str
    num_train_images: int
    num_val_images: int
    num_classes: int
    size_bytes: int
    layout: str
    licence: str
    num_train_sequences: int = 0
    num_val_sequences: int = 0
    forms: tuple[str, ...] = ()
    class_order: str = ""
    class_file: str | None = None
    names_file: str | None = None
    archives: tuple[Archive, ...] = ()
    parts: tuple[Archive, ...] = ()
    releases: tuple[Release, ...] = ()
    citation: Citation | None = None
    home: str = ""
    notes: tuple[str, ...] = ()
    size_is_estimate: bool = False
    typical_short_side: int | None = None
    array_side: int | None = None

    @property
    def num_images(self) -> int:
        """Training and validation images together."""
        return self.num_train_images + self.num_val_images

    @property
    def every_archive(self) -> tuple[Archive, ...]:
        """Archives of all releases and the parts, each file once."""
        found = [*self.archives, *(a for release in self.releases for a in release.archives), *self.parts]
        return tuple({archive.file: archive for archive in found}.values())


class _Facts(Mapping[str, DatasetFacts]):
    """All facts by dataset name; the file is read at the first look."""

    def __getitem__(self, name: str) -> DatasetFacts:
        return _read_facts()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_read_facts())

    def __len__(self) -> int:
        return len(_read_facts())


FACTS: Mapping[str, DatasetFacts] = _Facts()


def facts(dataset: str, data: DataConfig | None = None) -> DatasetFacts:
    """The facts of a dataset, or with `data.source: embedded` those of its embedded stand-in.

    Raises:
        DatasetError: for an unknown name.
    """
    if dataset not in FACTS:
        raise DatasetError(f"There is no dataset '{dataset}'", fix=f"use one of {', '.join(FACTS)}")
    if data is not None and data.source == "embedded":
        return embedded_facts(dataset, data.embedded)
    return FACTS[dataset]


def embedded_facts(dataset: str, config: EmbeddedConfig) -> DatasetFacts:
    """Sizes of a set of the embedded dataset (digits scenes).

    Raises:
        DatasetError: when the embedded dataset has no such set.
    """
    if dataset not in EMBEDDED_SETS:
        raise DatasetError(f"There is no embedded '{dataset}'", fix=f"use one of {', '.join(EMBEDDED_SETS)}")
    num_train, num_val, num_classes = {
        "imagenet": (config.train_images, config.val_images, 10),
        "imagenet22k": (config.intermediate_images, config.val_images, 50),
        "coco": (config.scene_train_images, config.scene_val_images, 10),
        "ade20k": (config.scene_train_images, config.scene_val_images, 18),
        "davis": (config.videos * config.video_frames, config.videos * config.video_frames, 0),
    }[dataset]
    side = config.image_size if dataset.startswith("imagenet") else config.scene_size
    num_sequences = config.videos if dataset == "davis" else 0
    return DatasetFacts(
        name=dataset,
        title=f"digits scenes in the layout of {FACTS[dataset].title}",
        num_train_images=num_train,
        num_val_images=num_val,
        num_classes=num_classes,
        # Measured: about 0.75 bytes per pixel at the quality and detail of these pictures.
        size_bytes=round(0.75 * side**2 * (num_train + num_val)),
        size_is_estimate=True,
        typical_short_side=side,
        layout=FACTS[dataset].layout,
        licence="scikit-learn and scikit-image sample data (BSD 3-Clause and public domain)",
        num_train_sequences=num_sequences,
        num_val_sequences=num_sequences,
    )


def train_sizes(data: DataConfig) -> dict[str, int]:
    """Number of training images of every dataset, embedded or real, by dataset name."""
    names = EMBEDDED_SETS if data.source == "embedded" else tuple(FACTS)
    return {name: facts(name, data).num_train_images for name in names}


@functools.cache
def class_order(dataset: str, release: str | None = None) -> tuple[str, ...]:
    """The class keys of a set in the order of the class numbers; empty where the folders found decide.

    ImageNet's keys are wnids, those of Flowers-102 the numbers `1` to `102`, all others names.

    Args:
        release: of a set that has several; the first if not given.

    Raises:
        DatasetError: for an unknown name, or when the installed timm lacks its list.
    """
    known = facts(dataset)
    if release is None:
        return _class_keys(known.class_file, known.num_classes)
    for found in known.releases:
        if found.name == release:
            return _class_keys(found.class_file, found.num_classes)
    names = ", ".join(found.name for found in known.releases) or "none"
    raise DatasetError(f"'{dataset}' has no release '{release}'", fix=f"its releases: {names}")


@functools.cache
def class_names(dataset: str) -> tuple[str, ...]:
    """Class names for people in canonical order; empty where neither a list nor names are known.

    Raises:
        DatasetError: as `class_order`.
    """
    known, keys = facts(dataset), class_order(dataset)
    if known.names_file:
        return _lines(known.names_file)
    if known.class_file and (dataset.startswith("imagenet")):
        names = _wnid_names()
        return tuple(names.get(key, key) for key in keys)
    return keys


def find_archive(dataset: str, file: str) -> Archive | None:
    """What is known about a released file of a set, from any of its releases.

    Raises:
        DatasetError: for an unknown dataset.
    """
    return next((archive for archive in facts(dataset).every_archive if archive.file == file), None)


def _class_keys(class_file: str | None, num_classes: int) -> tuple[str, ...]:
    if class_file is None:
        return ()
    if class_file in ("digits", "numbers"):
        first = int(class_file == "numbers")
        return tuple(str(number) for number in range(first, first + num_classes))
    return _lines(class_file)


def _lines(place: str) -> tuple[str, ...]:
    """The lines of a list in this package or in the installed timm."""
    package, colon, file = place.partition(":")
    if colon:
        text = bundled_file(package, f"data/_info/{file}").read_text(encoding="utf-8")
    else:
        text = (files("vitpipe") / "datasets" / place).read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@functools.cache
def _wnid_names() -> dict[str, str]:
    """wnid -> its first word in WordNet, for example `n01440764` -> `tench`."""
    rows = (line.split("\t") for line in _lines("timm:imagenet_synset_to_lemma.txt"))
    return {wnid: words.split(",")[0] for wnid, words in rows}


@functools.cache
def _read_facts() -> dict[str, DatasetFacts]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = (files("vitpipe") / "datasets" / "facts.yaml").read_text(encoding="utf-8")
    entries = yaml.load(text, Loader=loader)
    return {name: _facts_of(name, entries[name]) for name in (*SHARD_SETS, *DENSE_SETS)}


def _facts_of(name: str, entry: Mapping[str, Any]) -> DatasetFacts:
    fields = dict(entry)
    num_train, num_val = fields.pop("num_train"), fields.pop("num_val")
    releases = fields.pop("releases", {}).items()
    return DatasetFacts(
        name=name,
        num_train_images=num_train,
        num_val_images=num_val,
        forms=tuple(fields.pop("forms")),
        archives=_archives(fields.pop("archives")),
        parts=_archives(fields.pop("parts", ())),
        releases=tuple(_release(release, dict(found)) for release, found in releases),
        citation=Citation(**fields.pop("citation")),
        notes=tuple(fields.pop("notes", ())),
        **fields,
    )


def _release(name: str, fields: dict[str, Any]) -> Release:
    return Release(
        name=name,
        num_train_images=fields.pop("num_train"),
        num_val_images=fields.pop("num_val"),
        archives=_archives(fields.pop("archives")),
        **fields,
    )


def _archives(entries: Any) -> tuple[Archive, ...]:
    return tuple(Archive(**entry) for entry in entries)
