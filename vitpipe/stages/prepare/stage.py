"""Stage `prepare`: raw datasets in, shards and manifests out.

    find and verify every dataset > pack > (upload to the store) > near duplicates > contact sheet > tables

Embedded data is first written in the layouts of the real datasets and then packed like a user's folders. A
pinned prepared folder is downloaded instead of packed.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from vitpipe.config.data import DataConfig
from vitpipe.config.digest import digest_of
from vitpipe.config.resolve import num_packers
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.contracts.logger import RunLogger
from vitpipe.contracts.units import counted
from vitpipe.data.image_grid import optional_figure
from vitpipe.data.image_pixels import encoding_of
from vitpipe.data.manifest import (
    MANIFEST,
    DataManifest,
    ShardManifest,
    read_manifest,
    write_manifest,
)
from vitpipe.datasets.catalogue import facts
from vitpipe.datasets.embedded.write import write_embedded
from vitpipe.datasets.layouts import DenseLayout, inspected, verified
from vitpipe.datasets.sources.detect_format import find_source
from vitpipe.datasets.sources.source import Source
from vitpipe.datasets.subsets import views_among
from vitpipe.prepare.class_views import check_whole_sets, write_view
from vitpipe.prepare.contact_sheet import contact_sheet
from vitpipe.prepare.dense_sets import notes_of, pack_dense, point_dense
from vitpipe.prepare.duplicate_report import report_duplicates
from vitpipe.prepare.dvc_pull import dvc_revision, pull
from vitpipe.prepare.examine_parallel import PackOptions
from vitpipe.prepare.pack import PackProgress, Quarantine, pack
from vitpipe.prepare.payload import address_of, keep_in_store
from vitpipe.prepare.set_summary import (
    Manifest,
    class_rows,
    finding_rows,
    read_prepared,
    read_set,
    source_rows,
    split_rows,
    totals,
)
from vitpipe.stages.context import StageContext
from vitpipe.stages.used_datasets import record_prepared

_FINDINGS_LOGGED = 20


def run(ctx: StageContext) -> dict[str, float]:
    """Prepare the recipe's datasets; writes manifests, shards, archives and `contact_sheet.png`.

    Returns:
        Per set `<set>_num_train` and `<set>_num_val` images, and `num_bytes`, `num_corrupt`, `num_odd`.

    Raises:
        DatasetError: if a folder does not have the expected layout, or too many images are corrupt.
        StorageError: if a write to the disk or to a remote storage fails.
    """
    data, raw = ctx.recipe.data, ctx.state / "raw"
    with disk_errors(ctx.folder):
        try:
            if data.source == "pinned":
                _pull(ctx)
            else:
                shutil.rmtree(raw, ignore_errors=True)  # of a killed run, possibly incomplete
                prepare_sets(
                    ctx, _embedded_root(raw, data, ctx) if data.source == "embedded" else _user_root(data)
                )
            # From here on the source makes no difference: packed and pulled folders look the same.
            manifests = read_prepared(ctx.folder)
            if data.near_duplicates:
                for name, manifest in manifests.items():
                    # The whole set's table has the pairs of a class view, too.
                    if isinstance(manifest, ShardManifest) and manifest.view is None:
                        report_duplicates(ctx.folder, name, ctx.logger)
            with optional_figure("contact_sheet", ctx.logger.say):
                _draw_contact_sheet(ctx, raw)
        finally:
            shutil.rmtree(raw, ignore_errors=True)
    _report(ctx, manifests)
    record_prepared(ctx)
    return totals(manifests)


def prepare_sets(ctx: StageContext, root: Path) -> None:
    """Verify the layouts of all datasets below `root`, then pack them into the stage's folder.

    Raises:
        DatasetError: before anything is written, if a layout is wrong; after packing, if too many images are
            corrupt.
    """
    data, views = ctx.recipe.data, views_among(ctx.recipe.data.names)
    check_whole_sets(root, views.items())
    known = {name: facts(name, data) for name in data.names if name not in views}
    # All of them before the first is packed: what is wrong with COCO must not show after hours of packing
    # ImageNet.
    sources = {name: find_source(root, name, own) for name, own in known.items() if own.has_classes}
    layouts = {
        name: _examined(ctx, verified(own.kind, root / name, name))
        for name, own in known.items()
        if not own.has_classes
    }
    # One limit for all datasets: data.max_corrupt_images is a number for the whole stage.
    quarantine = Quarantine(data.max_corrupt_images)
    digests: dict[str, str] = {}
    for name, source in sources.items():
        digests[name] = _pack(ctx, source, quarantine).digest
    for name, layout in layouts.items():
        digests[name] = _prepare_dense(data, layout, ctx.folder / name).digest
    _move_to_store(ctx, ctx.folder)
    for name, whole in views.items():
        digests[name] = write_view(ctx.folder, name, whole).digest
    # The manifest of the whole folder comes last: it lists complete datasets only.
    write_manifest(
        ctx.folder,
        DataManifest(
            source=data.source,
            sets=digests,
            data_digest=digest_of(digests),
            revisions=_revisions(root, data),
        ),
    )


def _pack(ctx: StageContext, source: Source, quarantine: Quarantine) -> ShardManifest:
    """Pack one classification dataset, or reuse the shards of an earlier run if its source is unchanged."""
    data, name, started = ctx.recipe.data, source.dataset, time.monotonic()
    options = PackOptions(
        data.shard_megabytes * 1_000_000, encoding_of(data), data.near_duplicates, num_packers(data)
    )
    ctx.logger.say(f"{name}: {counted(len(source.classes), 'class', 'classes')}, format: {source.form}")
    for note in source.notes:
        ctx.logger.say(f"{name}: {note}")

    def log_progress(progress: PackProgress) -> None:
        speed = f"{progress.num_entries / progress.seconds:,.0f} images/s"
        ctx.logger.say(f"{name} {progress.split}: {counted(progress.num_entries, 'image')} packed, {speed}")

    folder = ctx.folder / name
    manifest = pack(
        source,
        folder,
        options=options,
        quarantine=quarantine,
        scratch=ctx.state / "pack" / name,
        previous=_previous(ctx, name),
        report=log_progress,
    )
    # `pack` creates its scratch folder only when it has something to pack.
    seconds, packed = time.monotonic() - started, (ctx.state / "pack" / name).exists()
    done = f"packed in {seconds:,.0f} s" if packed else "unchanged, shards of the earlier run reused"
    ctx.logger.say(f"{name}: {done}")
    return manifest


def _examined(ctx: StageContext, layout: DenseLayout) -> DenseLayout:
    """Look at every image and label map, and say what of the annotations was repaired or left out."""
    for text in notes_of(layout):
        ctx.logger.say(f"{layout.dataset}: {text}")
    return inspected(layout)


def _prepare_dense(data: DataConfig, layout: DenseLayout, out: Path) -> Manifest:
    """Pack a dense dataset as one archive, or reference the user's folder, as `data.keep_dense` says."""
    # auto: embedded data is deleted after this stage, and archives cannot be used in place.
    packs = data.keep_dense == "pack" or (
        data.keep_dense == "auto" and (data.source == "embedded" or not layout.is_folder)
    )
    return pack_dense(layout, out) if packs else point_dense(layout, out)


def _previous(ctx: StageContext, name: str) -> Path | None:
    """The dataset's folder of an earlier run, if its shards were stored in the same place."""
    folder = ctx.previous / name if ctx.previous else None
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    # `data.store` may have changed since; the address has the digest of the data, so it is computed per set.
    manifest, store = read_manifest(folder, ShardManifest), ctx.recipe.data.store
    return folder if manifest.store == (address_of(manifest, store.secret) if store else None) else None


def _move_to_store(ctx: StageContext, folder: Path) -> None:
    """Move shards and archives of all datasets to `data.store`, if set; manifests stay in the folder."""
    store = ctx.recipe.data.store
    if store is None:
        return
    for name in (path.parent.name for path in sorted(folder.glob(f"*/{MANIFEST}"))):
        manifest = read_set(folder, name)
        if manifest.store is None:  # shards reused from an earlier run are in the store already
            kept, num_sent = keep_in_store(folder / name, manifest, store.secret)
            if kept.store is not None:
                ctx.logger.say(f"{name}: {counted(num_sent, 'file')} uploaded to {kept.store}")


def _pull(ctx: StageContext) -> None:
    """Download a prepared folder at a revision, which is recorded in its manifest."""
    data, pinned = ctx.recipe.data, ctx.recipe.data.pinned
    assert pinned is not None, "the data section is validated"
    ctx.logger.say(f"Pulling {pinned.path} at {pinned.revision} from {pinned.repo}")
    # Directly to the volume if `data.store` is one: the disk of a pod may be smaller than the data. With the
    # digest in its name, the folder is not shared with other revisions, and a repeated run replaces it.
    on_volume = data.volume is not None
    place = data.volume / f".pull-{digest_of(pinned)[:16]}" if data.volume else ctx.folder
    revision = pull(pinned, place).as_dict()
    _move_to_store(ctx, place)
    pulled = read_manifest(place, DataManifest)
    if on_volume:
        for name in pulled.sets:
            shutil.copytree(place / name, ctx.folder / name)  # manifests and lists
        shutil.rmtree(place)
    # Class views that the recipe reads and the pinned folder lacks: they need its shards only.
    digests = {
        name: write_view(ctx.folder, name, whole).digest
        for name, whole in views_among((*pulled.sets, *data.names)).items()
        if name not in pulled.sets and whole in pulled.sets
    }
    sets = pulled.sets | digests
    changed = {
        "source": "pinned",
        "revisions": dict.fromkeys(sets, revision),
        "sets": sets,
        "data_digest": digest_of(sets),
    }
    write_manifest(ctx.folder, pulled.model_copy(update=changed))


def _revisions(root: Path, data: DataConfig) -> dict[str, dict[str, str]]:
    """DVC revisions of the raw datasets that DVC tracks."""
    # Embedded data comes from installed packages; pinned data has its revision from `pull`.
    if data.source != "folders":
        return {}
    known = {name: dvc_revision(root / name) for name in data.names}
    # The commit of their repository moves with every commit of other files; it is in the run record.
    return {
        name: {key: value for key, value in revision.items() if key != "dvc_commit"}
        for name, revision in known.items()
        if revision
    }


def _embedded_root(raw: Path, data: DataConfig, ctx: StageContext) -> Path:
    # Written as files in the real layouts, so that trials run the same readers as real data.
    ctx.logger.say(f"Generating the embedded datasets: {', '.join(data.names)}")
    write_embedded(raw, data.names, data.embedded)
    return raw


def _user_root(data: DataConfig) -> Path:
    if data.root is None or not data.root.is_dir():
        raise DatasetError(
            "The folder of the datasets does not exist",
            where=data.root or "data.root",
            fix="set data.root in params.yaml to the folder that contains imagenet/, coco/, ade20k/, or set "
            "data.source to embedded",
        )
    return data.root


def _draw_contact_sheet(ctx: StageContext, scratch: Path) -> None:
    sheet = ctx.folder / "contact_sheet.png"
    num_images = ctx.recipe.report.sample_images
    contact_sheet(ctx.folder, sheet, scratch=scratch, num_images=num_images, seed=ctx.recipe.seed)
    ctx.logger.figure("contact_sheet", sheet)


def _report(ctx: StageContext, manifests: dict[str, Manifest]) -> None:
    logger: RunLogger = ctx.logger
    revisions = read_manifest(ctx.folder, DataManifest).revisions
    splits, findings = split_rows(manifests), finding_rows(ctx.folder, manifests)
    logger.table("splits", splits)
    logger.table("classes", class_rows(manifests))
    logger.table("sources", source_rows(manifests, revisions))
    logger.table("findings", findings)
    for row in splits:
        logger.say(f"{row['dataset']} {row['split']}: {counted(row['num_images'], 'image')}")
    for row in findings[:_FINDINGS_LOGGED]:
        treatment = row["treatment"].capitalize()
        logger.say(f"{treatment}: {row['dataset']}/{row['file']} ({row['finding']})")
    if len(findings) > _FINDINGS_LOGGED:
        logger.say(
            f"and {len(findings) - _FINDINGS_LOGGED:,} more images with findings, in tables/findings.csv"
        )
