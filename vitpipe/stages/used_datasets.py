"""Record in the tracker which data a stage reads: name, digest, location, size, DVC revision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitpipe.config.data import DataConfig
from vitpipe.contracts.address import hidden
from vitpipe.data.manifest import DataManifest, ShardManifest, read_manifest
from vitpipe.datasets.catalogue import facts
from vitpipe.datasets.sources.detect_format import folder_of
from vitpipe.prepare.dvc_pull import dvc_revision
from vitpipe.prepare.set_summary import read_prepared, size_bytes
from vitpipe.stages.context import StageContext

PREPARED = "prepared"
# The words that MLflow shows beside a dataset.
CONTEXTS = {"train": "training", "val": "validation"}


def record_datasets(ctx: StageContext, dataset: str, splits: Sequence[str] = ("train", "val")) -> None:
    """Record the splits of a prepared set that this stage reads; MLflow shows them on the run's page."""
    folder = ctx.inputs["data"].path
    known = revisions_of(folder)
    for split in splits:
        _record(ctx, folder, dataset, split, CONTEXTS[split], known.get(PREPARED, known.get(dataset, {})))


def record_prepared(ctx: StageContext) -> None:
    """Record every set that the prepare stage has written."""
    known = read_manifest(ctx.folder, DataManifest).revisions
    for name in read_prepared(ctx.folder):
        for split in CONTEXTS:
            _record(ctx, ctx.folder, name, split, "preparation", known.get(name, {}))


def revisions_of(prepare_folder: Path) -> dict[str, dict[str, str]]:
    """DVC's revision of a prepared folder, as `prepared`; else those of its raw sets, by name."""
    known = dvc_revision(prepare_folder)
    return {PREPARED: known} if known else read_manifest(prepare_folder, DataManifest).revisions


def raw_revisions(prepare_folder: Path, data: DataConfig) -> dict[str, dict[str, str]]:
    """DVC's revisions of the raw sets that were prepared, by name, with the commit of their repository."""
    # The manifest has them without the commit, which moves with every commit of other files.
    if data.source == "folders" and data.root is not None:
        known = {name: dvc_revision(folder_of(data.root, facts(name, data))) for name in data.names}
        return {name: revision for name, revision in known.items() if revision}
    return read_manifest(prepare_folder, DataManifest).revisions


def _record(
    ctx: StageContext, folder: Path, name: str, split: str, context: str, revision: dict[str, str]
) -> None:
    manifest = read_prepared(folder)[name]
    # Where the bytes are: the store, the user's own folder, or the prepared folder.
    place: str | Path | None
    if isinstance(manifest, ShardManifest):
        num_images, place = manifest.splits[split].num_images, manifest.store
    else:
        num_images, place = manifest.counts[f"{split}_images"], manifest.root or manifest.store
    ctx.logger.dataset(
        f"{name}/{split}",
        manifest.digest,
        hidden(str(place or folder.resolve() / name)),
        context,
        {
            "num_images": num_images,
            "num_classes": len(manifest.classes),
            "size_bytes": size_bytes(manifest),
            "form": manifest.form,
            **{key: hidden(value) for key, value in revision.items()},
        },
    )
