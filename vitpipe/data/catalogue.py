"""Facts about the datasets, known before any data is there. Needs neither torch nor data.

Sizes: ILSVRC 2012 (Russakovsky et al., IJCV 2015); ImageNet-22K as released in fall 2011; COCO 2017 (Lin et
al., ECCV 2014); ADE20K scene parsing, ADEChallengeData2016 (Zhou et al., CVPR 2017); DAVIS 2017
(Pont-Tuset et al., 2017). COCO's 118,287 training images include 1,021 without annotations;
DAVIS frames are counted in the trainval release.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.resources import files

from vitpipe.config.data import DataConfig, EmbeddedConfig
from vitpipe.errors import DatasetError


@dataclass(frozen=True)
class DatasetFacts:
    """Sizes of one dataset. For DAVIS images are frames at 480p and there are no classes.

    Attributes:
        size_bytes: the released image archives; an estimate for embedded data.
        layout: the folders it must have, as one line for people.
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


_CLASS_FOLDERS = "train/<class>/<image>, val/<class>/<image>"
_COCO_LAYOUT = "train2017/, val2017/, annotations/instances_{train,val}2017.json"
_ADE_LAYOUT = "images/ and annotations/, each with training/ and validation/; objectInfo150.txt"
_DAVIS_LAYOUT = "JPEGImages/480p/, Annotations/480p/, ImageSets/2017/{train,val}.txt"
_TERMS = "ImageNet terms of access: non-commercial research"
FACTS: dict[str, DatasetFacts] = {
    facts.name: facts
    for facts in (
        DatasetFacts(
            "imagenet", "ImageNet-1K (ILSVRC 2012)", 1_281_167, 50_000, 1000,
            154_642_401_280, _CLASS_FOLDERS, _TERMS,
        ),
        DatasetFacts(
            "imagenet22k", "ImageNet-22K (fall 2011)", 14_197_122, 0, 21_841,
            1_310_000_000_000, "train/<class>/<image>, val/ optional", _TERMS,
        ),
        DatasetFacts(
            "coco", "COCO 2017", 118_287, 5_000, 80, 20_152_447_128, _COCO_LAYOUT,
            "annotations CC BY 4.0, images under Flickr's terms",
        ),
        DatasetFacts(
            "ade20k", "ADE20K (ADEChallengeData2016)", 20_210, 2_000, 150,
            967_382_037, _ADE_LAYOUT, "BSD 3-Clause for annotations, images non-commercial research",
        ),
        DatasetFacts(
            "davis", "DAVIS 2017 (480p)", 4_209, 1_999, 0, 833_000_000, _DAVIS_LAYOUT,
            "CC BY-NC 4.0", num_train_sequences=60, num_val_sequences=30,
        ),
    )
}  # fmt: skip


def facts(dataset: str, data: DataConfig | None = None) -> DatasetFacts:
    """The facts of a dataset, or with `data.source: embedded` those of its embedded stand-in.

    Raises:
        DatasetError: for an unknown name.
    """
    if dataset not in FACTS:
        raise DatasetError(f"There is no dataset '{dataset}'", mend=f"use one of {', '.join(FACTS)}")
    if data is not None and data.source == "embedded":
        return embedded_facts(dataset, data.embedded)
    return FACTS[dataset]


def embedded_facts(dataset: str, config: EmbeddedConfig) -> DatasetFacts:
    """Sizes of a set of the embedded dataset (digits scenes)."""
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
        dataset,
        f"digits scenes in the layout of {FACTS[dataset].title}",
        num_train,
        num_val,
        num_classes,
        # Measured: about 0.75 bytes per pixel at the quality and detail of these pictures.
        round(0.75 * side**2 * (num_train + num_val)),
        FACTS[dataset].layout,
        "scikit-learn and scikit-image sample data (BSD 3-Clause and public domain)",
        num_sequences,
        num_sequences,
    )


def train_sizes(data: DataConfig) -> dict[str, int]:
    """Number of training images of every dataset, embedded or real, by dataset name."""
    return {name: facts(name, data).num_train_images for name in FACTS}


@functools.cache
def class_names(dataset: str) -> tuple[str, ...]:
    """Class names in their canonical order, for `coco` (80) and `ade20k` (150)."""
    text = (files("vitpipe") / "data" / "names" / f"{dataset}.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines())
