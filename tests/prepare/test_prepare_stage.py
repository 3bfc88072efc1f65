"""The prepare stage in the test process: embedded data, user folders, corrupt images, full disks."""

import errno
import json
import shutil

import pytest
from PIL import Image

from vitpipe.config.data import EMBEDDED_SETS, DataConfig
from vitpipe.contracts.artifact import writing
from vitpipe.contracts.errors import DatasetError, StorageError
from vitpipe.data.manifest import read_digest
from vitpipe.data.shards import open_shards
from vitpipe.datasets.catalogue import class_names, facts
from vitpipe.datasets.layouts import verified
from vitpipe.datasets.set_sizes import train_sizes
from vitpipe.datasets.sources.detect_format import find_source
from vitpipe.prepare.contact_sheet import contact_sheet
from vitpipe.stages.prepare import stage as prepare


def test_embedded_data_end_to_end(prepared, make_context):
    ctx = make_context(source="embedded")
    metrics = prepare.run(ctx)
    assert metrics["imagenet_num_train"] == 30
    assert metrics["coco_num_val"] == 4
    assert metrics["num_corrupt"] == 0
    size = sum(path.stat().st_size for path in ctx.folder.rglob("*.tar"))
    assert metrics["num_bytes"] == size
    assert read_digest(ctx.folder) == read_digest(prepared), "same seed, same digest"
    tables = ctx.logger.tables
    assert {(row["dataset"], row["split"]) for row in tables["splits"]} == {
        (name, split) for name in EMBEDDED_SETS for split in ("train", "val")
    }
    assert sum(row["dataset"] == "ade20k" for row in tables["classes"]) == 18
    assert tables["findings"] == []
    with Image.open(ctx.logger.figures["contact_sheet"]) as sheet:
        assert sheet.width > 500
    assert [path.name for path in ctx.state.iterdir()] == ["pack"], "the raw folders are removed"
    assert len(list(ctx.folder.rglob("*"))) < 40, "few files: no folders of images"


def test_user_folders_end_to_end(raw, prepared, make_context):
    ctx = make_context(source="folders", root=raw)
    prepare.run(ctx)
    ours, theirs = (open_shards(folder, "imagenet", "train") for folder in (ctx.folder, prepared))
    assert ours.digest == theirs.digest
    manifest = json.loads((ctx.folder / "coco" / "manifest.json").read_text())
    assert manifest["root"] == str(raw / "coco")
    assert not list(ctx.folder.rglob("coco.tar"))
    assert not (ctx.state / "raw").exists()


def test_corrupt_images_are_in_the_table_and_the_log(raw_copy, make_context):
    victim = next((raw_copy / "imagenet" / "train").rglob("*.JPEG"))
    victim.write_bytes(b"")
    ctx = make_context(source="folders", root=raw_copy, sets=("imagenet",), max_corrupt_images=1)
    assert prepare.run(ctx)["num_corrupt"] == 1
    assert ctx.logger.tables["findings"][0]["file"].endswith(victim.name)
    assert any(victim.name in line for line in ctx.logger.lines)


def test_a_missing_root_and_a_missing_set(raw_copy, make_context, tmp_path):
    ctx = make_context(source="folders", root=tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"does not exist.*nowhere.*data\.root"):
        prepare.run(ctx)
    shutil.rmtree(raw_copy / "coco")
    with pytest.raises(DatasetError, match=r"'coco' is missing"):
        prepare.prepare_sets(ctx, raw_copy)
    assert list(ctx.folder.iterdir()) == [], "all layouts are verified before anything is packed"


@pytest.mark.parametrize("place", ["shard", "raw"])
def test_a_full_disk_leaves_no_incomplete_folder(raw, make_context, monkeypatch, place):
    ctx = make_context(source="embedded" if place == "raw" else "folders", root=raw, sets=("imagenet",))
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*arguments, **options):
        raise full

    if place == "shard":
        monkeypatch.setattr("vitpipe.prepare.shard_writer.ShardWriter._write", refuse)
    else:
        monkeypatch.setattr("vitpipe.datasets.embedded.write._save_jpeg", refuse)
    out = ctx.folder.parent / "finished"
    with pytest.raises(StorageError, match="No space left"), writing(out) as partial:
        prepare.run(type(ctx)(**{**vars(ctx), "folder": partial}))
    assert not out.exists()
    assert not list(out.parent.glob(".finished*"))
    assert not list(ctx.state.rglob("*.tar")), "no shard has the name of a complete one"


def test_facts_of_the_embedded_sets_match_the_written_files(raw, tiny):
    data = DataConfig(source="embedded", embedded=tiny)
    for name in ("imagenet", "imagenet22k"):
        source = find_source(raw, name)
        known = facts(name, data)
        assert known.num_classes == len(source.classes)
        assert known.num_train_images == sum(1 for _ in source.entries("train"))
        assert known.num_val_images == sum(1 for _ in source.entries("val"))
    for name in ("coco", "ade20k", "davis"):
        layout, known = verified(name, raw / name, name), facts(name, data)
        assert known.num_classes == len(layout.classes)
        assert (known.num_train_images, known.num_val_images) == (
            layout.counts["train_images"], layout.counts["val_images"],
        )  # fmt: skip
        assert known.num_train_sequences == layout.counts.get("train_sequences", 0)
    assert train_sizes(data, ["imagenet"]) == {"imagenet": 30}


def test_facts_of_the_real_sets():
    assert (facts("imagenet").num_train_images, facts("imagenet").num_val_images) == (1_281_167, 50_000)
    assert (facts("imagenet22k").num_train_images, facts("imagenet22k").num_classes) == (14_197_122, 21_841)
    assert len(class_names("coco")) == facts("coco").num_classes == 80
    assert len(class_names("ade20k")) == facts("ade20k").num_classes == 150
    assert train_sizes(DataConfig(root="x"), ["coco"]) == {"coco": 118_287}
    with pytest.raises(DatasetError, match="no dataset 'cifar'"):
        facts("cifar")


def test_a_contact_sheet_of_a_users_folders(raw, make_context, tmp_path):
    ctx = make_context(source="folders", root=raw, sets=("coco", "ade20k"))
    prepare.run(ctx)
    contact_sheet(ctx.folder, tmp_path / "sheet.png", scratch=tmp_path / "scratch", num_images=5)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(set(sheet.getdata())) > 1000
