"""The `data` section of a recipe: which sets, where they lie, how they are packed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from vitpipe.config.section import Auto, Count, Effects, Pixels, Section, refuse_twice
from vitpipe.config.set_names import check_own_sets, check_set_name
from vitpipe.contracts.address import Address, hidden
from vitpipe.contracts.errors import RecipeError, shortened

_EMBEDDED_CLASSES = {"imagenet": 10, "imagenet22k": 50}  # see datasets/embedded/write.py
EMBEDDED_SETS = ("imagenet", "imagenet22k", "coco", "ade20k", "davis")
_MAX_NAME_BYTES = 255  # NAME_MAX of Linux and macOS
# An object storage's credentials come from the AWS variables and files, so none can stand in its address.
S3_ADDRESS = re.compile(r"s3://(?P<bucket>[A-Za-z0-9._\-]+)(?:/(?P<prefix>[^?#]*))?")


def _not_an_address(value: Any) -> Any:
    """A path has no credentials to hide, and would show those of an address that was given for it."""
    if "://" in str(value):
        raise ValueError(f"'{hidden(str(value))}' is an address, which cannot stand here")
    return value


def _at_home(value: Any) -> Any:
    """`~/data` as a shell has it: in a file, and behind the = of `--set`, no shell replaces it."""
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111  (before pydantic)


def _possible_name(value: Any) -> Any:
    """Refuse a name that no file system takes while the key that holds it is known."""
    longest = max(str(value).split("/"), key=len)
    if len(os.fsencode(longest)) > _MAX_NAME_BYTES:
        raise ValueError(
            f"the name '{shortened(longest)}' in this path has {len(os.fsencode(longest)):,} bytes, and file "
            f"systems take {_MAX_NAME_BYTES}"
        )
    return value


LocalPath = Annotated[
    Path, BeforeValidator(_at_home), BeforeValidator(_possible_name), BeforeValidator(_not_an_address)
]
HomeAddress = Annotated[Address, BeforeValidator(_at_home)]
PlainName = Annotated[str, BeforeValidator(_not_an_address)]


class EmbeddedConfig(Section):
    """Sizes of the embedded dataset (digits composed on photographic textures)."""

    effects: ClassVar[Effects] = Effects(
        weights=(
            "seed image_size train_images val_images intermediate_images scene_size "
            "scene_train_images scene_val_images video_frames videos"
        ),
    )

    seed: int = 0
    # Small enough that a whole chain trains in minutes on two cores, large enough for 16-pixel units.
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
        repo: address or folder of the git repository that tracks it. Better without user and password, which
            git finds by a credential helper: a dumped recipe and a compiled pipeline do not have them.
        revision: commit, tag or branch; recorded as the commit that it named. One that is all digits has to
            be quoted, as YAML reads it as a number.
        path: the prepared folder inside the repository.
        remote: which of the repository's DVC remotes; its default one if not given.
        digest: data digest that it must have; not checked if not given.
    """

    # A commit such as 1234567 is a number in YAML.
    model_config = ConfigDict(coerce_numbers_to_str=True)

    effects: ClassVar[Effects] = Effects(
        weights="repo revision path remote digest",
    )

    repo: HomeAddress
    revision: str
    path: str
    remote: PlainName | None = None
    digest: str | None = None


class DataConfig(Section):
    """What is seen, and how it is kept.

    Attributes:
        source: `folders` packs the user's sets below `root`, `pinned` pulls a prepared folder at one DVC
            revision, `embedded` composes small real images.
        root: the user's folder with imagenet/, coco/, cifar10/, ...: folders or the original archives.
        sets: what is prepared; `auto` is every set that a stage of the recipe reads.
        own_sets: sets that are not in the catalogue: the name, which is that of the folder below `root`, and
            the layout, `classes` (train/<class>/<image>, val/<class>/<image>) or the catalogue set whose
            layout it has (coco, ade20k, davis).
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

    effects: ClassVar[Effects] = Effects(
        weights=(
            "source root sets own_sets embedded pinned shard_megabytes short_side jpeg_quality "
            "keep_dense store"
        ),
        figures="near_duplicates",
        nothing="max_corrupt_images workers",
    )

    source: Literal["embedded", "folders", "pinned"] = "folders"
    root: LocalPath | None = None
    sets: tuple[str, ...] | Auto = "auto"
    own_sets: dict[str, str] = {}
    embedded: EmbeddedConfig = EmbeddedConfig()
    pinned: PinnedConfig | None = None
    # Large enough for sequential reads from disks and buckets, small enough that a kill repeats little.
    shard_megabytes: Count = 256
    # None by default: a published result is one of the whole set.
    max_corrupt_images: Annotated[int, Field(ge=0)] = 0
    short_side: Pixels | None = None
    jpeg_quality: Annotated[int, Field(ge=50, le=100)] = 95
    near_duplicates: bool = False
    keep_dense: Literal["auto", "pack", "point"] = "auto"
    store: HomeAddress | None = None
    workers: Annotated[int, Field(ge=0)] | Auto = "auto"

    @model_validator(mode="after")
    def _is_consistent(self) -> DataConfig:
        if self.source == "pinned" and self.pinned is None:
            raise ValueError("source is 'pinned', without a section pinned (repo, revision, path)")
        check_own_sets(self.own_sets)
        if self.sets != "auto":
            refuse_twice("sets", self.sets)
            self._check_sets(self.sets)
        if self.store is not None and self.volume is None and not S3_ADDRESS.fullmatch(self.store.secret):
            raise ValueError(
                f"store is '{self.store}', but must be s3://bucket/prefix or an absolute path; its "
                "credentials are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return self

    def root_problem(self, *, looks: bool) -> str:
        """Why `prepare` could not find the raw data; empty if it could.

        Args:
            looks: whether the folder has to be on this machine; a compiled pipeline's is on another.
        """
        if self.source != "folders":
            return ""
        if self.root is None:
            return "data.root is not set"
        return f"data.root does not exist: {self.root}" if looks and not self.root.is_dir() else ""

    def require_root(self, where: str) -> None:
        """Refuse raw data without a folder before anything is written or started.

        Raises:
            RecipeError: when `data.root` is not set.
        """
        if problem := self.root_problem(looks=False):
            raise RecipeError(
                f"{problem}, and data.source is 'folders': nothing could be prepared",
                where=where,
                fix="set data.root to the folder that contains imagenet/, coco/, ... (in params.yaml, or by "
                "--set data.root=/data), or use the profile demo",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The sets that are prepared; `auto` has been replaced by them when the recipe was read."""
        assert self.sets != "auto", "a recipe resolves it"
        return self.sets

    def with_sets(self, names: tuple[str, ...]) -> DataConfig:
        """The same with these sets.

        Raises:
            ValueError: for an unknown set, or one that the embedded data lack.
        """
        self._check_sets(names)
        return self.model_copy(update={"sets": names})

    def _check_sets(self, names: tuple[str, ...]) -> None:
        for name in names:
            check_set_name(name, self.own_sets)
        absent = [name for name in names if name not in EMBEDDED_SETS]
        if self.source == "embedded" and absent:
            raise ValueError(
                f"there is no embedded '{absent[0]}'; there are {', '.join(EMBEDDED_SETS)}. Set data.source "
                "to folders and data.root to the folder of your datasets"
            )
        if self.source == "embedded":
            self._has_all_embedded_classes(names)

    def _has_all_embedded_classes(self, names: tuple[str, ...]) -> None:
        """Every class needs an image in both splits, or the readers refuse the set."""
        for name, num_classes in _EMBEDDED_CLASSES.items():
            first = "intermediate_images" if name == "imagenet22k" else "train_images"
            for key in (first, "val_images"):
                number = getattr(self.embedded, key)
                if name in names and number < num_classes:
                    raise ValueError(
                        f"embedded.{key} is {number}, but each of the {num_classes} classes of the embedded "
                        f"{name} needs an image"
                    )

    @property
    def volume(self) -> Path | None:
        """The folder in which shards are kept; None without a store, or when it is an object storage."""
        is_folder = self.store is not None and self.store.secret.startswith("/")
        return Path(self.store.secret) if self.store is not None and is_folder else None
