"""Class views: some classes of a packed set as a dataset of its own, without a second copy of the images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.data.manifest import ClassView, ShardManifest, SplitManifest, content_digest, write_manifest
from vitpipe.data.shards import read_shard_manifest
from vitpipe.datasets.catalogue import class_order


def check_whole_sets(root: Path, views: Iterable[tuple[str, str]]) -> None:
    """Check that the whole set of every class view is there.

    Args:
        views: pairs of view and whole set.

    Raises:
        DatasetError: when only a folder of the classes exists.
    """
    for name, whole in views:
        if not (root / whole).is_dir() and (root / name).is_dir():
            raise DatasetError(
                f"'{name}' is to be read from the shards of '{whole}', whose folder is missing",
                where=root / whole,
                fix=f"put '{whole}' there; or, to pack the folder {name}/ by itself, set data.sets to a list "
                f"with '{name}' and without '{whole}'",
            )


def write_view(prepare_folder: Path, dataset: str, whole: str) -> ShardManifest:
    """Write the manifest of a class view beside the packed set whose shards it shares.

    Args:
        dataset: name of the view; its classes are those of the catalogue.
        whole: name of the packed set.

    Raises:
        DatasetError: when the packed set lacks some of the classes.
        StorageError: when the disk refuses the write.
    """
    packed, keys = read_shard_manifest(prepare_folder, whole), class_order(dataset)
    number = {key: position for position, key in enumerate(packed.classes)}
    if missing := [key for key in keys if key not in number]:
        raise DatasetError(
            f"{len(missing)} of the {len(keys)} classes of '{dataset}' "
            f"{'is' if len(missing) == 1 else 'are'} "
            f"missing in '{whole}': "
            f"{some(missing)}",
            where=prepare_folder / whole,
            fix=f"prepare all of '{whole}', or name another dataset in the stages that read '{dataset}'",
        )
    chosen = [number[key] for key in keys]
    manifest = ShardManifest(
        dataset=dataset,
        classes=keys,
        class_names=tuple(packed.class_names[position] for position in chosen) if packed.class_names else (),
        splits={split: _split(own, chosen) for split, own in packed.splits.items()},
        encoding=packed.encoding,
        form=f"{len(keys)} classes of {whole}: {packed.form}",
        store=packed.store,
        view=ClassView(dataset=whole, digest=packed.digest),
        notes=packed.notes,
        digest="",
    )
    manifest = manifest.model_copy(update={"digest": content_digest(manifest)})
    folder = prepare_folder / dataset
    folder.mkdir(exist_ok=True)
    write_manifest(folder, manifest)
    return manifest


def _split(whole: SplitManifest, chosen: list[int]) -> SplitManifest:
    counts = tuple(whole.images_per_class[position] for position in chosen)
    return SplitManifest(
        num_images=sum(counts), images_per_class=counts, index="", index_sha256="", shards=()
    )
