"""Some classes of a packed set: the images, labels and batches of the same classes packed by themselves."""

import shutil

import numpy as np
import pytest
import torch
from embedded_sets import _context
from miniatures import mini_imagenet, write_class_folders, write_original, write_parquet

from vitpipe.config.data import DataConfig, PinnedConfig
from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.errors import DatasetError
from vitpipe.data.augment import eval_transform
from vitpipe.data.batches import eval_batches
from vitpipe.data.class_selection import ClassSelection
from vitpipe.data.manifest import DataManifest, content_digest, read_manifest
from vitpipe.data.shards import open_shards, read_shard_manifest, verify_checksums
from vitpipe.datasets.catalogue import class_order, facts
from vitpipe.prepare.class_views import write_view
from vitpipe.prepare.dataset_doctor import examine
from vitpipe.stages.prepare import stage as prepare

TEN = class_order("imagenet10")
# Classes before, between and behind the ten; not a multiple of 7 (see `MiniImageNet.ids`).
MANY = mini_imagenet(tuple(sorted({*TEN, "n01440764", "n02123394", "n15075141"})), 5, 2)


def prepared(folder, root, *sets, **fields):
    """The output of the prepare stage, its metrics and messages."""
    ctx = _context(folder, DataConfig(source="folders", root=root, sets=sets, **fields))
    return ctx.folder, prepare.run(ctx), ctx.logger


def same(ours, theirs) -> bool:
    """Whether two nested tuples of tensors and numbers are equal, bit for bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("write", [write_class_folders, write_original, write_parquet])
def test_a_view_is_the_same_set_as_the_classes_packed_by_themselves(tmp_path, write):
    write(MANY, tmp_path / "imagenet")
    viewed, metrics, _ = prepared(tmp_path / "viewed", tmp_path, "imagenet", "imagenet10")
    packed, *_ = prepared(tmp_path / "packed", tmp_path, "imagenet10")
    assert not list((viewed / "imagenet10").glob("*.tar"))
    assert list((packed / "imagenet10").glob("*.tar"))
    assert (metrics["imagenet10_num_train"], metrics["imagenet10_num_val"]) == (50, 20)
    for split in ("train", "val"):
        ours, theirs = (open_shards(folder, "imagenet10", split) for folder in (viewed, packed))
        assert len(ours) == len(theirs) == 10 * {"train": 5, "val": 2}[split]
        assert (ours.classes, ours.class_names) == (theirs.classes, theirs.class_names)
        assert ours.labels.tolist() == theirs.labels.tolist()
        every = range(len(ours))
        images = [(sample.label, sample.image_bytes) for sample in ours.read_many(every)]
        assert images == [(sample.label, sample.image_bytes) for sample in theirs.read_many(every)]
        transform = eval_transform(16, 1.0, AugmentConfig())
        first, second = (
            list(eval_batches(shards, transform, batch=7, rank=0, num_ranks=1, workers=workers))
            for shards, workers in ((ours, 1), (theirs, 0))
        )
        assert len(first) == len(second) > 1
        assert all(map(same, first, second))


def test_classes_in_another_order_have_their_numbers_and_order():
    labels = np.array([0, 0, 1, 1, 2, 3, 3], np.uint32)
    chosen = ClassSelection(labels, ("a", "b", "c", "d"), ("d", "a"))
    assert chosen.positions.tolist() == [5, 6, 0, 1]
    assert chosen.labels(labels).tolist() == [0, 0, 1, 1]
    assert [chosen.label(3), chosen.label(0)] == [0, 1]
    # Not packed class by class: the order of the source.
    shuffled = ClassSelection(labels[::-1], ("a", "b", "c", "d"), ("d", "a"))
    assert shuffled.positions.tolist() == [0, 1, 5, 6]


def test_the_digest_of_a_view_follows_from_the_whole_set_and_the_classes(tmp_path):
    write_class_folders(MANY, tmp_path / "imagenet")
    folder, *_ = prepared(tmp_path / "one", tmp_path, "imagenet", "imagenet10")
    view = read_shard_manifest(folder, "imagenet10")
    assert view.digest == content_digest(view) == read_manifest(folder, DataManifest).sets["imagenet10"]
    assert content_digest(view.model_copy(update={"classes": view.classes[:9]})) != view.digest
    other = view.view.model_copy(update={"digest": "0" * 64})
    assert content_digest(view.model_copy(update={"view": other})) != view.digest
    assert content_digest(view.model_copy(update={"form": "as in the shop"})) == view.digest
    assert verify_checksums(folder, "imagenet10") == 0


def test_a_view_of_a_set_that_has_changed_is_refused(tmp_path):
    write_class_folders(MANY, tmp_path / "imagenet")
    folder, *_ = prepared(tmp_path / "one", tmp_path, "imagenet", "imagenet10")
    next((tmp_path / "imagenet/train" / TEN[0]).iterdir()).unlink()
    other, *_ = prepared(tmp_path / "two", tmp_path, "imagenet")
    shutil.copytree(folder / "imagenet10", other / "imagenet10")
    with pytest.raises(DatasetError, match="'imagenet' has changed since its classes were listed"):
        open_shards(other, "imagenet10", "train")


def test_classes_that_the_packed_set_lacks_are_named(tmp_path):
    write_class_folders(mini_imagenet(TEN[1:], 1, 1), tmp_path / "imagenet")
    with pytest.raises(DatasetError, match=rf"1 of the 10 classes of 'imagenet10' is missing.*{TEN[0]}"):
        prepared(tmp_path / "one", tmp_path, "imagenet", "imagenet10")


def test_the_users_own_folder_of_the_classes(tmp_path):
    write_class_folders(mini_imagenet(TEN, 1, 1), tmp_path / "imagenet10")
    with pytest.raises(
        DatasetError, match=r"whose folder is missing.*data\.sets to a list with 'imagenet10'"
    ):
        prepared(tmp_path / "one", tmp_path, "imagenet", "imagenet10")
    folder, *_ = prepared(tmp_path / "two", tmp_path, "imagenet10")
    assert read_shard_manifest(folder, "imagenet10").view is None


def test_tables_and_the_doctor_know_views(tmp_path):
    write_class_folders(MANY, tmp_path / "imagenet")
    folder, metrics, logger = prepared(
        tmp_path / "one", tmp_path, "imagenet", "imagenet10", near_duplicates=True
    )
    rows = {(row["dataset"], row["split"]): row for row in logger.tables["splits"]}
    assert rows["imagenet10", "train"]["size_bytes"] == 0
    assert metrics["num_bytes"] == sum(path.stat().st_size for path in folder.rglob("*.tar"))
    assert [name for name in logger.tables if name.startswith("near_dup")] == ["near_duplicates_imagenet"]
    report = next(found for found in examine(folder, checksums=True) if found.dataset == "imagenet10")
    assert (report.num_train, report.num_val, report.num_classes) == (50, 20, 10)
    assert not [finding for finding in report.findings if finding.level == "error"]


def test_a_view_of_shards_in_a_store(tmp_path):
    write_class_folders(MANY, tmp_path / "imagenet")
    store = tmp_path / "store"
    folder, *_ = prepared(tmp_path / "one", tmp_path, "imagenet", "imagenet10", store=str(store))
    assert not list(folder.rglob("*.tar"))
    shards = open_shards(folder, "imagenet10", "val")
    assert [sample.image_bytes for sample in shards.read_many(range(20))] == [
        content for _, _, content in MANY.expected("val", TEN)
    ]


def test_a_pinned_folder_gets_the_views_that_a_recipe_reads(tmp_path, monkeypatch):
    write_class_folders(MANY, tmp_path / "imagenet")
    folder, *_ = prepared(tmp_path / "one", tmp_path, "imagenet")

    class Revision:
        def as_dict(self):
            return {"dvc_commit": "0" * 40}

    def pull(config, place):
        shutil.copytree(folder, place, dirs_exist_ok=True)
        return Revision()

    monkeypatch.setattr("vitpipe.stages.prepare.stage.pull", pull)
    pinned = PinnedConfig(repo=str(tmp_path), revision="v1", path="prepared")
    ctx = _context(
        tmp_path / "two", DataConfig(source="pinned", pinned=pinned, sets=("imagenet", "imagenet10"))
    )
    prepare.run(ctx)
    assert set(read_manifest(ctx.folder, DataManifest).sets) == {"imagenet", "imagenet10"}
    assert len(open_shards(ctx.folder, "imagenet10", "train")) == 50


def test_a_second_view_needs_no_packing(tmp_path):
    write_class_folders(MANY, tmp_path / "imagenet")
    folder, *_ = prepared(tmp_path / "one", tmp_path, "imagenet")
    before = read_shard_manifest(folder, "imagenet")
    write_view(folder, "imagenet10", "imagenet")
    assert read_shard_manifest(folder, "imagenet") == before
    assert len(open_shards(folder, "imagenet10", "val")) == 20


def test_ten_classes_alone_are_packed_from_imagenets_folder_and_examined_there(tmp_path):
    assert TEN == (
        "n02056570", "n02085936", "n02128757", "n02690373", "n02692877",
        "n03095699", "n04254680", "n04285008", "n04467665", "n07747607",
    )  # fmt: skip
    known = facts("imagenet10")
    assert (known.num_train_images, known.num_val_images, known.num_classes) == (13_000, 500, 10)
    write_class_folders(MANY, tmp_path / "imagenet")
    folder, metrics, _ = prepared(tmp_path / "one", tmp_path, "imagenet10")
    manifest = read_shard_manifest(folder, "imagenet10")
    assert (manifest.classes, manifest.view) == (TEN, None)
    assert (metrics["imagenet10_num_train"], metrics["imagenet10_num_val"]) == (50, 20)
    (report,) = examine(tmp_path, ["imagenet10"], deep=True)
    assert (report.num_train, report.num_val, report.num_classes) == (50, 20, 10)
    levels = {finding.level: finding.what for finding in report.findings}
    assert "error" not in levels
    assert "20 images, 480 fewer than the 500 of ImageNet-10" in levels["warning"]
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "imagenet" / split / TEN[3])
    (report,) = examine(tmp_path, ["imagenet10"])
    (error,) = [finding for finding in report.findings if finding.level == "error"]
    assert f"1 of the 10 classes of 'imagenet10' is missing: {TEN[3]}" in error.what
