"""Facts about the datasets from `facts/<name>.yaml`: kind, readers, counts, classes, archives, citation.

Needs no data and neither torch nor numpy. The files, ours and those of plugins, are read once, on the first
access. A set is found by its file; all keys but `title` have a default.

`source` of an archive names where its checksum and size were published or recorded:
    torchvision    torchvision.datasets (imagenet.py, cifar.py, svhn.py, flowers102.py)
    tfds           tensorflow-datasets, url_checksums/*.txt and */checksums.tsv
    datalad        the git-annex keys (MD5E) of github.com/datasets-mila
Null is a value for which no such source was found. `size_bytes` of a set is the sum of its image archives;
`typical_short_side` is for estimates only: the most frequent size in ImageNet is 500 x 375.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vitpipe.config.data import EMBEDDED_SETS, DataConfig, EmbeddedConfig
from vitpipe.config.set_names import facts_files
from vitpipe.contracts.discovery import files_in
from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.files import read_text
from vitpipe.contracts.graph import CLASSES
from vitpipe.datasets.bundled import bundled_file

# What is read here, for the identity of stages (config/code_identity.py).
DATA_FILES = ("datasets/facts/{dataset}.yaml", "datasets/names/{dataset}.txt")
# The readers of a set that names none: of the user's own, as most people keep their images.
_OWN_READERS = ("class_folders", "parquet")
_OWN_FORMS = ("class folders train/<class>/, val/<class>/", "Hugging Face parquet files")
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Archive:
    """One released file.

    Attributes:
        role: its content, as a phrase.
        size_bytes: None where no published value was found.
        checksum: hexadecimal; None where none was published.
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
        class_file: source of its class keys, see `DatasetFacts`.
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
    """The publication to cite."""

    authors: str
    title: str
    venue: str
    year: int

    def __str__(self) -> str:
        """As one line of a bibliography."""
        return f"{self.authors}, {self.title}, {self.venue}, {self.year}"


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about one dataset. For DAVIS, images are frames at 480p and there are no classes.

    Attributes:
        kind: `classes` for images with classes, packed in shards; else the module of `datasets/layouts/` that
            verifies its layout.
        reader: modules of `datasets/sources/`, one per format in which it comes; the preferred one first.
        classes_of: the set of which it is some classes, whose shards it shares.
        folder: folder below data.root that may hold it, where that is not of its name.
        num_train_images: 0 if unknown, as of a set of the user's own.
        files_per_image: of a dense set.
        size_bytes: of the released image archives; an estimate if `size_is_estimate`.
        layout: the required folders and files, as one line of text.
        forms: the formats that the prepare stage accepts, one line of text each.
        class_order: where the order of the classes comes from, as text.
        class_file: list of the class keys in order: `names/FILE` of this package, `timm:FILE` of the
            installed timm, or `digits` and `numbers`, which are generated; None where the class folders
            decide.
        names_file: list of readable class names, where the keys are not names.
        archives: the released files of the set (of its first release, if there are several).
        parts: members of an archive that have a checksum of their own.
        typical_short_side: in pixels, for estimates.
        array_side: in pixels, of a set that is released as arrays instead of image files.
    """

    name: str
    title: str
    kind: str = CLASSES
    reader: tuple[str, ...] = _OWN_READERS
    classes_of: str | None = None
    folder: str | None = None
    num_train_images: int = 0
    num_val_images: int = 0
    num_classes: int = 0
    files_per_image: int = 1
    size_bytes: int = 0
    layout: str = "train/<class>/<image>, val/<class>/<image>"
    licence: str = ""
    num_train_sequences: int = 0
    num_val_sequences: int = 0
    forms: tuple[str, ...] = _OWN_FORMS
    class_order: str = "sorted names of the class folders"
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
    def has_classes(self) -> bool:
        """Whether it is a set of images with classes, not one of scenes or videos with annotations."""
        return self.kind == CLASSES

    @property
    def num_images(self) -> int:
        """Training and validation images together."""
        return self.num_train_images + self.num_val_images

    @property
    def every_archive(self) -> tuple[Archive, ...]:
        """Archives of all releases and the parts, each file once."""
        # By file name: the set's own archives are those of its first release, which lists them again.
        found = [*self.archives, *(a for release in self.releases for a in release.archives), *self.parts]
        return tuple({archive.file: archive for archive in found}.values())


class _Facts(Mapping[str, DatasetFacts]):
    """All facts by dataset name: images with classes first, then by name; read on the first access."""

    def __getitem__(self, name: str) -> DatasetFacts:
        return _read_facts(tuple(facts_files().values()))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_read_facts(tuple(facts_files().values())))

    def __len__(self) -> int:
        return len(facts_files())


# Read on first access: parsing takes 0.1 s, and modules that only need the types import this one.
FACTS: Mapping[str, DatasetFacts] = _Facts()


def facts(dataset: str, data: DataConfig | None = None) -> DatasetFacts:
    """The facts of a dataset, or with `data.source: embedded` those of its embedded replacement.

    Args:
        data: has the user's own sets, about which no more is known than their layout.

    Raises:
        DatasetError: for an unknown name.
    """
    if data is not None and dataset in data.own_sets:
        layout = data.own_sets[dataset]
        kind = CLASSES if layout == CLASSES else FACTS[layout].kind
        if kind == CLASSES:
            return DatasetFacts(dataset, f"{dataset} (own set)")
        like = FACTS[layout]
        return DatasetFacts(
            dataset,
            f"{dataset} (own set in the layout of {like.title})",
            kind=kind,
            reader=(),
            files_per_image=like.files_per_image,
            layout=like.layout,
            forms=like.forms[:1],
            class_order="as in its annotations",
        )
    if dataset not in FACTS:
        raise DatasetError(
            f"There is no dataset '{dataset}'",
            fix=f"use one of {', '.join(FACTS)}, or name yours in data.own_sets",
        )
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
    # Classes: ten digits; digit x five backgrounds; eight backgrounds and ten digits (see
    # embedded/write.py, which is not imported because it needs numpy).
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
        kind=FACTS[dataset].kind,
        reader=FACTS[dataset].reader,
        files_per_image=FACTS[dataset].files_per_image,
        title=f"digits scenes in the layout of {FACTS[dataset].title}",
        num_train_images=num_train,
        num_val_images=num_val,
        num_classes=num_classes,
        # Measured on the written sets: about 0.75 bytes per pixel at JPEG quality 95.
        size_bytes=round(0.75 * side**2 * (num_train + num_val)),
        size_is_estimate=True,
        typical_short_side=side,
        layout=FACTS[dataset].layout,
        licence="scikit-learn and scikit-image sample data (BSD 3-Clause and public domain)",
        num_train_sequences=num_sequences,
        num_val_sequences=num_sequences,
    )


@functools.cache
def class_order(dataset: str, release: str | None = None) -> tuple[str, ...]:
    """The class keys of a set in the order of the class numbers; empty where the class folders decide.

    The keys of ImageNet are wnids, those of Flowers-102 the numbers `1` to `102`, all others are names.

    Args:
        release: of a set that has several; the first one if not given.

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
    """Readable class names in the order of the class numbers; empty where no list is known.

    Raises:
        DatasetError: as `class_order`.
    """
    known, keys = facts(dataset), class_order(dataset)
    if known.names_file:
        return _lines(known.names_file)
    if known.class_file and all(_WNID.fullmatch(key) for key in keys):
        names = _wnid_names()
        return tuple(names.get(key, key) for key in keys)
    return keys


def _class_keys(class_file: str | None, num_classes: int) -> tuple[str, ...]:
    if class_file is None:
        return ()
    # "digits" 0 to 9 (SVHN), "numbers" from 1 (Flowers-102, whose labels MATLAB counts from 1).
    if class_file in ("digits", "numbers"):
        first = int(class_file == "numbers")
        return tuple(str(number) for number in range(first, first + num_classes))
    return _lines(class_file)


def _lines(list_file: str) -> tuple[str, ...]:
    """The lines of a list: `names/FILE` of this package or a plugin, or `timm:FILE` of the installed timm."""
    package, colon, file = list_file.partition(":")
    if colon:
        # timm's folder of class lists; private, hence the pinned version and the error of `bundled_file`.
        text = bundled_file(package, f"data/_info/{file}").read_text(encoding="utf-8")
    else:
        found = files_in("datasets", list_file)
        if not found:
            raise DatasetError(
                "A list of classes is missing", where=f"datasets/{list_file}", fix="put it beside facts/"
            )
        text = found[0].read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@functools.cache
def _wnid_names() -> dict[str, str]:
    """Wnid to its first lemma in WordNet, for example `n01440764` to `tench`."""
    rows = (line.split("\t") for line in _lines("timm:imagenet_synset_to_lemma.txt"))
    return {wnid: words.split(",")[0] for wnid, words in rows}


@functools.cache
def _read_facts(files: tuple[Path, ...]) -> dict[str, DatasetFacts]:
    import yaml

    from vitpipe.contracts.safe_yaml import SAFE_LOADER

    entries = {path.stem: yaml.load(read_text(path), Loader=SAFE_LOADER) for path in files}
    found = {path.stem: _facts_of(path, entries[path.stem]) for path in files}
    for path in files:
        known = found[path.stem]
        if known.classes_of is None:
            continue
        if known.classes_of not in found or known.class_file is None:
            raise DatasetError(
                f"'{known.name}' is said to be some classes of '{known.classes_of}', without saying which",
                where=path,
                fix="name a catalogue set in classes_of, and in class_file a list of its class keys",
            )
        if "reader" not in entries[known.name]:
            found[known.name] = replace(known, reader=found[known.classes_of].reader)
    return dict(sorted(found.items(), key=lambda item: (not item[1].has_classes, item[0])))


def _facts_of(path: Path, entry: Mapping[str, Any]) -> DatasetFacts:
    fields = dict(entry)
    for key in ("num_train", "num_val"):
        if key in fields:
            fields[f"{key}_images"] = fields.pop(key)
    for key in ("reader", "forms", "notes"):
        if key in fields:
            fields[key] = tuple(fields[key])
    for key in ("archives", "parts"):
        fields[key] = _archives(fields.get(key, ()))
    releases = fields.pop("releases", {}).items()
    citation = fields.pop("citation", None)
    try:
        return DatasetFacts(
            name=path.stem,
            releases=tuple(_release(release, dict(found)) for release, found in releases),
            citation=Citation(**citation) if citation else None,
            **fields,
        )
    except TypeError as error:  # a plugin's file: an unknown key, or no title
        raise DatasetError(
            f"The facts of the dataset '{path.stem}' have a wrong key ({error})",
            where=path,
            fix="use the keys of the files of vitpipe/datasets/facts; `title` is required",
        ) from error


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
