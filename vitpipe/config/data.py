"""The `data` section of a recipe: which sets, where they lie, how they are packed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field, model_validator

from vitpipe.config.section import Auto, Count, Pixels, Section

ShardSetName = Literal[
    "imagenet",
    "imagenet22k",
    "imagenet100",
    "imagenet10",
    "cifar10",
    "cifar100",
    "svhn",
    "flowers102",
    "domainnet_clipart",
    "domainnet_infograph",
    "domainnet_painting",
    "domainnet_sketch",
]
DenseSetName = Literal["coco", "ade20k", "davis"]
SetName = Literal[ShardSetName, DenseSetName]
SHARD_SETS: tuple[str, ...] = get_args(ShardSetName)
DENSE_SETS: tuple[str, ...] = get_args(DenseSetName)
EMBEDDED_SETS = ("imagenet", "imagenet22k", "coco", "ade20k", "davis")


class EmbeddedConfig(Section):
    """Sizes of the embedded dataset (digits composed on photographic textures)."""

    seed: int = 0
    image_size: Pixels = 64
    train_images: Count = 2000
    val_images: Count = 400
    intermediate_images: Count = 2000
    scene_size: Pixels = 128
    scene_train_images: Count = 200
    scene_val_images: Count = 60
    video_frames: Count = 8
    videos: Count = 2


class PinnedConfig(Section):
    """A prepared folder that somebody has made and pushed with DVC, at one revision.

    Attributes:
        repo: address or folder of the git repository that tracks it.
        revision: commit, tag or branch; recorded as the commit that it named. One that is all digits has to
            be quoted, as YAML reads it as a number.
        path: the prepared folder inside the repository.
        remote: which of the repository's DVC remotes; its default one if not given.
        digest: data digest that it must have; not checked if not given.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)

    repo: str
    revision: str
    path: str
    remote: str | None = None
    digest: str | None = None


class DataConfig(Section):
    """What is seen, and how it is kept.

    Attributes:
        source: `folders` packs the user's sets below `root`, `pinned` pulls a prepared folder at one DVC
            revision, `embedded` composes small real images.
        root: the user's folder with imagenet/, coco/, cifar10/, ...: folders or the original archives.
        short_side: images with a longer short side are reduced to it while packing (it changes pixels and
            is recorded); None keeps every file byte for byte.
        jpeg_quality: of images that had to be encoded again.
        near_duplicates: compare train and val by perceptual hash and report pairs.
        keep_dense: `pack` writes COCO, ADE20K and DAVIS as one archive each, `point` leaves a folder where
            it is; `auto` packs archives and embedded data, and points at folders.
        store: where shards and archives are kept: s3://bucket/prefix, or a folder that every machine sees at
            the same path, such as a mounted volume. In the prepared folder if None.
        workers: loader processes; also those that check images while packing.
    """

    source: Literal["embedded", "folders", "pinned"] = "folders"
    root: Path | None = None
    sets: tuple[SetName, ...] = ("imagenet", "imagenet22k", "coco", "ade20k")
    embedded: EmbeddedConfig = EmbeddedConfig()
    pinned: PinnedConfig | None = None
    shard_megabytes: Count = 256
    max_corrupt_images: Annotated[int, Field(ge=0)] = 0
    short_side: Pixels | None = None
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = 95
    near_duplicates: bool = False
    keep_dense: Literal["auto", "pack", "point"] = "auto"
    store: str | None = None
    workers: Annotated[int, Field(ge=0)] | Auto = "auto"

    @model_validator(mode="after")
    def _is_consistent(self) -> DataConfig:
        if self.source == "pinned" and self.pinned is None:
            raise ValueError("source is 'pinned', without a section pinned (repo, revision, path)")
        absent = [name for name in self.sets if name not in EMBEDDED_SETS]
        if self.source == "embedded" and absent:
            raise ValueError(f"there is no embedded '{absent[0]}'; there are {', '.join(EMBEDDED_SETS)}")
        if self.store is not None and not self.store.startswith(("s3://", "/")):
            raise ValueError(f"store is '{self.store}', but must be s3://bucket/prefix or an absolute path")
        return self
