"""Stage `prepare`: raw datasets in, shards and manifests out.

Embedded data is first written in the layouts of the real sets and then goes the same way as a user's
folders: verify, pack. Only then are dense sets packed into one archive each; a user's stay where they are.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vitpipe.config.data import DataConfig
from vitpipe.config.digest import digest_of
from vitpipe.data.contact import contact_sheet
from vitpipe.data.dense import pack_dense, point_dense
from vitpipe.data.embedded.write import write_embedded
from vitpipe.data.manifest import (
    SHARD_SETS,
    DataManifest,
    DenseManifest,
    ShardManifest,
    write_manifest,
)
from vitpipe.data.pack import Quarantine, pack
from vitpipe.data.verify import VERIFY_DENSE, verify_class_folders
from vitpipe.errors import DatasetError, disk_errors
from vitpipe.stages.context import StageContext

Manifest = ShardManifest | DenseManifest


def run(ctx: StageContext) -> dict[str, float]:
    """Prepare the recipe's datasets; writes manifests, shards, archives and `contact_sheet.png`.

    Returns:
        Per set `<set>_num_train` and `<set>_num_val` images, and `num_bytes`, `num_corrupt`.

    Raises:
        DatasetError: when a folder is not the dataset it should be, or too many images are corrupt.
        StorageError: when the disk refuses a write.
    """
    data = ctx.recipe.data
    raw = ctx.state / "raw"
    with disk_errors(ctx.folder):
        try:
            shutil.rmtree(raw, ignore_errors=True)  # what a killed run may have left
            root = _embedded_root(raw, data, ctx) if data.source == "embedded" else _user_root(data)
            quarantine = Quarantine(data.max_corrupt_images)
            manifests = prepare_sets(root, ctx.folder, data, quarantine)
            digests = {name: manifest.digest for name, manifest in manifests.items()}
            write_manifest(
                ctx.folder,
                DataManifest(source=data.source, sets=digests, data_digest=digest_of(digests)),
            )
            sheet = ctx.folder / "contact_sheet.png"
            num_images = ctx.recipe.report.sample_images
            contact_sheet(ctx.folder, sheet, scratch=raw, num_images=num_images, seed=ctx.recipe.seed)
            ctx.logger.figure("contact_sheet", sheet)
        finally:
            shutil.rmtree(raw, ignore_errors=True)
    _report(ctx, manifests, quarantine)
    return _metrics(manifests, quarantine)


def prepare_sets(root: Path, out: Path, data: DataConfig, quarantine: Quarantine) -> dict[str, Manifest]:
    """Verify all named sets below `root` first, then pack them into `out`; set name -> manifest.

    Raises:
        DatasetError: before anything is written, when a layout is wrong; after packing, when too many
            images are corrupt.
    """
    class_folders = {
        name: verify_class_folders(root / name, name) for name in data.sets if name in SHARD_SETS
    }
    dense = {name: VERIFY_DENSE[name](root / name) for name in data.sets if name not in SHARD_SETS}
    manifests: dict[str, Manifest] = {}
    for name, folders in class_folders.items():
        shard_bytes = data.shard_megabytes * 1_000_000
        manifests[name] = pack(folders, out / name, shard_bytes=shard_bytes, quarantine=quarantine)
    keep = pack_dense if data.source == "embedded" else point_dense
    for name, layout in dense.items():
        manifests[name] = keep(layout, out / name)
    return manifests


def _embedded_root(raw: Path, data: DataConfig, ctx: StageContext) -> Path:
    ctx.logger.say(f"Composing the embedded datasets: {', '.join(data.sets)}")
    write_embedded(raw, data.sets, data.embedded)
    return raw


def _user_root(data: DataConfig) -> Path:
    if data.root is None or not data.root.is_dir():
        raise DatasetError(
            "The folder of the datasets does not exist",
            where=data.root or "data.root",
            mend="set data.root in params.yaml to the folder that holds imagenet/, coco/, ade20k/, or set "
            "data.source to embedded",
        )
    return data.root


def _report(ctx: StageContext, manifests: dict[str, Manifest], quarantine: Quarantine) -> None:
    splits: list[dict[str, Any]] = []
    classes: list[dict[str, Any]] = []
    for name, manifest in manifests.items():
        splits += _split_rows(name, manifest)
        classes += _class_rows(name, manifest)
    left_out = [{"dataset": name, **entry.model_dump()} for name, entry in quarantine.entries]
    ctx.logger.table("splits", splits)
    ctx.logger.table("classes", classes)
    ctx.logger.table("quarantine", left_out)
    for row in splits:
        ctx.logger.say(f"{row['dataset']} {row['split']}: {row['num_images']:,} images")
    for entry in left_out:
        ctx.logger.say(f"Left out: {entry['dataset']}/{entry['file']} ({entry['reason']})")


def _split_rows(name: str, manifest: Manifest) -> list[dict[str, Any]]:
    rows = []
    for split in ("train", "val"):
        if isinstance(manifest, ShardManifest):
            own = manifest.splits[split]
            num_images, num_objects = own.num_images, own.num_images
            num_bytes, num_files = own.size_bytes, len(own.shards)
        else:
            num_images = manifest.counts[f"{split}_images"]
            num_objects = manifest.counts.get(f"{split}_annotations", num_images)
            num_bytes, num_files = manifest.size_bytes, 1
        rows.append(
            {
                "dataset": name,
                "split": split,
                "num_images": num_images,
                "num_annotations": num_objects,
                "num_classes": len(manifest.classes),
                "num_files": num_files,
                "size_bytes": num_bytes,
                "digest": manifest.digest,
            }
        )
    return rows


def _class_rows(name: str, manifest: Manifest) -> list[dict[str, Any]]:
    if isinstance(manifest, DenseManifest):
        counts: tuple[tuple[Any, Any], ...] = (("", ""),) * len(manifest.classes)
        names: tuple[str, ...] = manifest.classes
    else:
        both = (manifest.splits[split].images_per_class for split in ("train", "val"))
        counts = tuple(zip(*both, strict=True))
        names = manifest.class_names or manifest.classes
    return [
        {"dataset": name, "number": number, "class": key, "name": title, "num_train": train, "num_val": val}
        for number, (key, title, (train, val)) in enumerate(zip(manifest.classes, names, counts, strict=True))
    ]


def _metrics(manifests: dict[str, Manifest], quarantine: Quarantine) -> dict[str, float]:
    metrics: dict[str, float] = {"num_corrupt": len(quarantine.entries), "num_bytes": 0.0}
    for name, manifest in manifests.items():
        rows = _split_rows(name, manifest)
        for row in rows:
            metrics[f"{name}_num_{row['split']}"] = row["num_images"]
        sizes = {row["size_bytes"] for row in rows} if isinstance(manifest, DenseManifest) else ()
        shard_sizes = (row["size_bytes"] for row in rows) if isinstance(manifest, ShardManifest) else ()
        metrics["num_bytes"] += sum(sizes) + sum(shard_sizes)
    return metrics
