"""Packing: reproducible bytes, reading by WebDataset, corrupt images, reuse of earlier shards, full disks."""

import csv
import tarfile

import numpy as np
import pytest
from PIL import Image

from vitpipe.contracts.errors import DatasetError, RunError, StorageError
from vitpipe.data.manifest import FINDINGS, Encoding, ShardManifest, read_manifest
from vitpipe.data.shards import ShardSet
from vitpipe.datasets.sources.byte_ranges import FileSpan
from vitpipe.datasets.sources.detect_format import find_source
from vitpipe.datasets.sources.source import ImageEntry, Source
from vitpipe.prepare.examine_parallel import PackOptions
from vitpipe.prepare.pack import Quarantine, pack


def pack_imagenet(root, out, *, limit=0, previous=None, quarantine=None, **options):
    return pack(
        find_source(root, "imagenet"),
        out,
        options=PackOptions(**{"shard_bytes": 20_000, **options}),
        quarantine=quarantine or Quarantine(limit),
        scratch=out.with_name(f"{out.name}.scratch"),
        previous=previous,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def findings(folder):
    with (folder / FINDINGS).open(newline="", encoding="utf-8") as file:
        return {row["file"].rsplit("/", 1)[1]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_bytes_do_not_depend_on_the_number_of_processes(raw, tmp_path, workers):
    first = pack_imagenet(raw, tmp_path / "a")
    second = pack_imagenet(raw, tmp_path / "b", workers=workers)
    assert first == second
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_are_plain_tars_that_webdataset_can_read(raw, tmp_path):
    manifest = pack_imagenet(raw, tmp_path / "packed")
    shards = manifest.splits["train"].shards
    assert len(shards) > 1
    originals = sorted((raw / "imagenet" / "train").rglob("*.JPEG"))
    images, labels = [], []
    for shard in shards:
        with tarfile.open(tmp_path / "packed" / shard.name) as tar:
            members = tar.getmembers()
            assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in members)
            for image, label in zip(members[::2], members[1::2], strict=True):
                # WebDataset groups by everything before the first dot.
                assert image.name.split(".", 1)[0] == label.name.split(".", 1)[0]
                assert (image.name.split(".", 1)[1], label.name.split(".", 1)[1]) == ("jpeg", "cls")
                images.append(tar.extractfile(image).read())
                labels.append(int(tar.extractfile(label).read()))
    assert images == [path.read_bytes() for path in originals]
    assert labels == [manifest.classes.index(path.parent.name) for path in originals]
    assert sum(shard.num_images for shard in shards) == len(originals)


def test_the_manifest_counts_and_names(raw, tmp_path):
    pack_imagenet(raw, tmp_path / "packed")
    manifest = read_manifest(tmp_path / "packed", ShardManifest)
    assert manifest.splits["train"].images_per_class == (3,) * 10
    assert manifest.splits["val"].images_per_class == (5,) * 10
    assert manifest.class_names[7] == "digit seven"
    assert manifest.form == "class folders"
    assert manifest.findings == {}
    assert len(manifest.digest) == 64


def test_the_digest_follows_the_content_and_not_the_form(raw_copy, tmp_path):
    before = pack_imagenet(raw_copy, tmp_path / "a")
    moved = raw_copy.rename(tmp_path / "elsewhere")
    assert pack_imagenet(moved, tmp_path / "b").digest == before.digest
    victim = next((moved / "imagenet" / "train").rglob("*.JPEG"))
    Image.new("RGB", (32, 32), "red").save(victim, "JPEG")
    assert pack_imagenet(moved, tmp_path / "c").digest != before.digest


def test_names_with_special_characters_stay_distinct(raw_copy, tmp_path):
    folder = raw_copy / "imagenet" / "train" / "n99900000"
    image = next(folder.iterdir()).read_bytes()
    for name in ("a.b.jpg", "a b.JPG", "ä" * 90 + ".jpeg", "a_b.jpg"):
        (folder / name).write_bytes(image)
    manifest = pack_imagenet(raw_copy, tmp_path / "packed", shard_bytes=10**9)
    shards = ShardSet(tmp_path / "packed", manifest, "train")
    keys = [shards.read(position).key for position in range(len(shards))]
    assert len(set(keys)) == len(shards) == 34
    with tarfile.open(tmp_path / "packed" / "train-000000.tar") as tar:
        assert all(name.count(".") == 1 and name.isascii() for name in tar.getnames())


def damage(raw):
    """Make one image truncated, one empty and one a text file; returns their names."""
    truncated, empty, text = sorted((raw / "imagenet" / "train").rglob("*.JPEG"))[:3]
    truncated.write_bytes(truncated.read_bytes()[:-200])
    empty.write_bytes(b"")
    text.write_text("not found")
    return [path.name for path in (truncated, empty, text)]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_left_out_and_listed_by_name(raw_copy, tmp_path, workers):
    names = damage(raw_copy)
    quarantine = Quarantine(3)
    manifest = pack_imagenet(raw_copy, tmp_path / "packed", quarantine=quarantine, workers=workers)
    listed = findings(tmp_path / "packed")
    assert list(listed) == names
    assert {row["treatment"] for row in listed.values()} == {"left out"}
    assert listed[names[1]]["finding"] == "empty file"
    assert manifest.findings == {"left out": 3}
    assert manifest.splits["train"].num_images == 27
    assert quarantine.num_left_out == 3


def test_more_corrupt_images_than_allowed_are_refused_and_complete_shards_are_kept(raw_copy, tmp_path):
    names = damage(raw_copy)
    with pytest.raises(DatasetError, match="3 images are unusable, 2 are allowed") as caught:
        pack_imagenet(raw_copy, tmp_path / "packed", limit=2)
    assert all(name in str(caught.value) for name in names)
    assert "data.max_corrupt_images to at least 3" in caught.value.fix
    assert not (tmp_path / "packed").exists()
    shard = tmp_path / "packed.scratch" / "train-000000.tar"
    made = shard.stat().st_mtime_ns
    pack_imagenet(raw_copy, tmp_path / "packed", limit=3)
    assert shard.stat().st_mtime_ns == made
    assert len(findings(tmp_path / "packed")) == 3


def test_the_error_names_the_first_images_only(tmp_path):
    quarantine = Quarantine(0)
    for number in range(50):
        quarantine.add(f"{number}.jpg", "empty file")
    with pytest.raises(DatasetError, match="and 30 more"):
        quarantine.check(tmp_path)


def test_a_folder_and_a_dangling_link_among_the_images_are_listed(raw_copy, tmp_path):
    folder = raw_copy / "imagenet" / "train" / "n99900000"
    (folder / "more").mkdir()
    (folder / "gone.JPEG").symlink_to("nowhere")
    pack_imagenet(raw_copy, tmp_path / "packed", limit=2)
    listed = findings(tmp_path / "packed")
    assert "cannot be read" in listed["more"]["finding"]
    assert "cannot be read" in listed["gone.JPEG"]["finding"]


def test_an_unchanged_source_is_not_packed_again(raw_copy, tmp_path):
    first = pack_imagenet(raw_copy, tmp_path / "first")
    again = pack_imagenet(raw_copy, tmp_path / "again", previous=tmp_path / "first")
    assert again == first
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    assert not (tmp_path / "again.scratch").exists(), "nothing was packed"
    victim = next((raw_copy / "imagenet" / "val").rglob("*.JPEG"))
    victim.write_bytes(b"")
    changed = pack_imagenet(raw_copy, tmp_path / "changed", previous=tmp_path / "first", limit=1)
    assert changed.splits["val"].num_images == first.splits["val"].num_images - 1


def test_images_that_an_earlier_run_left_out_are_counted_again(raw_copy, tmp_path):
    damage(raw_copy)
    pack_imagenet(raw_copy, tmp_path / "first", limit=3)
    quarantine = Quarantine(3)
    pack_imagenet(raw_copy, tmp_path / "again", previous=tmp_path / "first", quarantine=quarantine)
    assert quarantine.num_left_out == 3
    with pytest.raises(DatasetError, match="3 images are unusable, 2 are allowed"):
        pack_imagenet(raw_copy, tmp_path / "strict", previous=tmp_path / "first", limit=2)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("loss", ["shard", "findings", "other options", "half a shard"])
def test_an_incomplete_earlier_run_or_one_of_other_options_is_not_reused(raw, tmp_path, loss):
    first = pack_imagenet(raw, tmp_path / "first")
    shard = tmp_path / "first" / "train-000000.tar"
    if loss == "shard":
        shard.unlink()
    elif loss == "half a shard":
        shard.unlink()
        shard.write_bytes(b"half")
    elif loss == "findings":
        (tmp_path / "first" / FINDINGS).unlink()
    options = {"shard_bytes": 30_000} if loss == "other options" else {}
    again = pack_imagenet(raw, tmp_path / "again", previous=tmp_path / "first", **options)
    assert (tmp_path / "again.scratch").exists(), "it was packed again"
    assert (again == first) == (loss != "other options")


def test_large_images_are_resized_on_request_and_the_manifest_records_it(raw_copy, tmp_path):
    folder = raw_copy / "imagenet" / "train" / "n99900000"
    Image.effect_noise((500, 300), 60).convert("RGB").save(folder / "large.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    encoding = Encoding(short_side=100, quality=90)
    manifest = pack_imagenet(raw_copy, tmp_path / "packed", encoding=encoding)
    shards = ShardSet(tmp_path / "packed", manifest, "train")
    by_key = {shards.read(position).key.partition("-")[2]: position for position in range(len(shards))}
    image, label = shards.decode(by_key["large"])
    assert (image.size, label) == ((167, 100), 0)
    small = next(name for name in before if name.startswith("n99"))
    assert shards.read(by_key[small.removesuffix(".JPEG")]).image_bytes == before[small]
    assert manifest.encoding == encoding
    assert manifest.digest != pack_imagenet(raw_copy, tmp_path / "plain").digest
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "the source is not changed"


def test_hashes_are_stored_in_the_order_of_the_images(raw, tmp_path):
    manifest = pack_imagenet(raw, tmp_path / "packed", hashed=True)
    hashes = np.fromfile(tmp_path / "packed" / manifest.splits["train"].hashes, "<u8")
    assert len(hashes) == 30
    assert len(np.unique(hashes)) > 20


class OneEntry(Source):
    """A source with one entry."""

    dataset, form, classes, splits = "imagenet", "a list", ("a", "b"), ("train",)

    def __init__(self, root, entry):
        self.root, self.entry = root, entry

    def entries(self, split):
        yield self.entry


def test_a_label_out_of_range_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    entry = ImageEntry("a.jpg", 2, FileSpan(str(tmp_path / "a.jpg")), "a.jpg")
    with pytest.raises(DatasetError, match="label 2, but there are 2 classes"):
        pack(
            OneEntry(tmp_path, entry),
            tmp_path / "out",
            options=PackOptions(1000),
            quarantine=Quarantine(0),
            scratch=tmp_path / "scratch",
        )


class Deadly:
    """A byte range that kills the process that reads it, as the out-of-memory killer does."""

    def read(self):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    def stamp(self):
        return "deadly"


def test_a_killed_worker_is_an_error_with_a_fix(tmp_path):
    source = OneEntry(tmp_path, ImageEntry("a.jpg", 0, Deadly(), "a.jpg"))
    with pytest.raises(RunError, match=r"was killed.*continues after the last complete shard"):
        pack(
            source,
            tmp_path / "out",
            options=PackOptions(1000, workers=1),
            quarantine=Quarantine(0),
            scratch=tmp_path / "scratch",
        )
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_storage_error_and_leaves_no_complete_shard(raw, tmp_path, monkeypatch):
    out = tmp_path / "packed"
    scratch = tmp_path / "packed.scratch"

    def full(path, size_bytes, real=__import__("vitpipe.prepare.shard_writer", fromlist=["x"]).open_cut):
        handle = real(path, size_bytes)
        # Every write to /dev/full fails with ENOSPC.
        (scratch / "train-000000.tar.partial").symlink_to("/dev/full")
        return handle

    monkeypatch.setattr("vitpipe.prepare.shard_writer.open_cut", full)
    with pytest.raises(StorageError, match="No space left"):
        pack_imagenet(raw, out)
    assert not out.exists()
    assert not list(scratch.glob("*.tar"))
