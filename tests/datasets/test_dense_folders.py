import io
import shutil
import tarfile
import zipfile

import pytest

from vitpipe.config.digest import file_digest
from vitpipe.contracts.errors import DatasetError
from vitpipe.data.manifest import DenseManifest, read_manifest, write_manifest
from vitpipe.data.shards import open_shards
from vitpipe.datasets.dense_folder import open_dense
from vitpipe.datasets.layouts import verified
from vitpipe.datasets.layouts.ade20k import verify_ade20k
from vitpipe.datasets.layouts.davis import verify_davis
from vitpipe.prepare.dense_sets import pack_dense, point_dense


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """The dense sets of a prepared folder; read only."""
    out = tmp_path_factory.mktemp("packed")
    for name in ("coco", "ade20k", "davis"):
        pack_dense(verified(name, raw / name, name), out / name)
    return out


@pytest.mark.parametrize("name", ["coco", "ade20k", "davis"])
def test_an_unpacked_set_is_the_one_that_was_packed(raw, prepared, tmp_path, name):
    dense = open_dense(prepared, name, tmp_path)
    layout = verified(name, raw / name, name)
    assert verified(name, dense.root, name).files == layout.files
    assert all((dense.root / file).read_bytes() == (raw / name / file).read_bytes() for file in layout.files)
    assert (dense.classes, dense.counts) == (layout.classes, layout.counts)
    assert [path.name for path in tmp_path.iterdir()] == [dense.root.name], "no temporary folder is left"


def test_an_archive_is_unpacked_once(prepared, tmp_path):
    first = open_dense(prepared, "davis", tmp_path)
    stamp = (first.root / "ImageSets").stat().st_mtime_ns
    (first.root / "mark").touch()
    again = open_dense(prepared, "davis", tmp_path)
    assert again == first
    assert (again.root / "mark").exists()
    assert (again.root / "ImageSets").stat().st_mtime_ns == stamp


def test_packing_twice_gives_the_same_bytes(raw, prepared, tmp_path):
    manifest = pack_dense(verify_ade20k(raw / "ade20k"), tmp_path / "ade20k")
    assert manifest == read_manifest(prepared / "ade20k", DenseManifest)
    ours, theirs = tmp_path / "ade20k" / "ade20k.tar", prepared / "ade20k" / "ade20k.tar"
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture
def prepared_copy(prepared, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(prepared, tmp_path / "prepared")


@pytest.fixture
def davis_zip(raw_copy):
    """The set as published: one archive in its folder."""
    root = raw_copy / "davis"
    with zipfile.ZipFile(raw_copy / "davis.zip", "w") as archive:
        for path in root.rglob("*"):
            archive.write(path, f"DAVIS/{path.relative_to(root)}")
    shutil.rmtree(root)
    root.mkdir()
    (raw_copy / "davis.zip").rename(root / "DAVIS-2017-trainval-480p.zip")
    return root


def test_an_original_archive_packs_to_the_same_bytes(davis_zip, prepared, tmp_path):
    before = (davis_zip / "DAVIS-2017-trainval-480p.zip").read_bytes()
    manifest = pack_dense(verify_davis(davis_zip), tmp_path / "davis")
    assert manifest.form == "archives (DAVIS-2017-trainval-480p.zip)"
    same = read_manifest(prepared / "davis", DenseManifest)
    assert manifest.model_copy(update={"form": same.form}) == same
    assert (tmp_path / "davis" / "davis.tar").read_bytes() == (prepared / "davis" / "davis.tar").read_bytes()
    assert sorted(p.name for p in (tmp_path / "davis").iterdir()) == ["davis.tar", "manifest.json"]
    assert [p.read_bytes() for p in davis_zip.iterdir()] == [before]


def test_an_original_archive_cannot_be_used_in_place(davis_zip, tmp_path):
    with pytest.raises(DatasetError, match=r"DAVIS-2017.*data\.keep_dense"):
        point_dense(verify_davis(davis_zip), tmp_path / "davis")
    assert not (tmp_path / "davis").exists()


def test_packing_that_ends_early_leaves_nothing_that_looks_complete(raw_copy, tmp_path):
    layout = verify_ade20k(raw_copy / "ade20k")
    victim = raw_copy / "ade20k" / layout.files[-3]
    content = victim.read_bytes()
    victim.unlink()
    victim.mkdir()  # a folder cannot be read as a file
    with pytest.raises(DatasetError, match=r"A file cannot be read.*ade20k"):
        pack_dense(layout, tmp_path / "ade20k")
    assert not list((tmp_path / "ade20k").iterdir())
    victim.rmdir()
    victim.write_bytes(content)
    pack_dense(layout, tmp_path / "ade20k")
    assert sorted(p.name for p in (tmp_path / "ade20k").iterdir()) == ["ade20k.tar", "manifest.json"]


def test_a_file_that_grows_while_it_is_packed(raw_copy, tmp_path, monkeypatch):
    layout = verify_ade20k(raw_copy / "ade20k")
    real = layout.tree.chunks
    monkeypatch.setattr(layout.tree, "chunks", lambda name: iter([*real(name), b"more"]))
    with pytest.raises(DatasetError, match="changed while it was"):
        pack_dense(layout, tmp_path / "ade20k")


def test_a_changed_or_missing_archive(prepared_copy, tmp_path):
    archive = prepared_copy / "davis" / "davis.tar"
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=r"checksum.*davis\.tar"):
        open_dense(prepared_copy, "davis", tmp_path / "scratch")
    archive.unlink()
    with pytest.raises(DatasetError, match="archive is missing"):
        open_dense(prepared_copy, "davis", tmp_path / "scratch")
    with pytest.raises(DatasetError, match="not in the prepared data"):
        open_dense(tmp_path, "davis", tmp_path / "scratch")


@pytest.mark.parametrize("trick", ["parent", "absolute link", "device"])
def test_malicious_archives_are_refused_and_leave_nothing(prepared_copy, tmp_path, trick):
    archive = prepared_copy / "davis" / "davis.tar"
    with tarfile.open(archive, "w") as tar:
        info = tarfile.TarInfo("../escaped" if trick == "parent" else "entry")
        if trick == "absolute link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif trick == "device":
            info.type = tarfile.CHRTYPE
        tar.addfile(info, io.BytesIO())
    # The manifest is as untrusted as the archive: whoever exchanged one can exchange both.
    manifest = read_manifest(prepared_copy / "davis", DenseManifest)
    changed = manifest.model_copy(update={"archive_sha256": file_digest(archive)})
    write_manifest(prepared_copy / "davis", changed)
    scratch = tmp_path / "scratch"
    with pytest.raises(DatasetError, match="archive is refused"):
        open_dense(prepared_copy, "davis", scratch)
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "escaped").exists()


def test_a_users_folder_is_used_in_place(raw_copy, tmp_path):
    manifest = point_dense(verify_ade20k(raw_copy / "ade20k"), tmp_path / "ade20k")
    dense = open_dense(tmp_path, "ade20k", tmp_path / "scratch")
    assert dense.root == raw_copy / "ade20k"
    assert dense.digest == manifest.digest
    assert not (tmp_path / "scratch").exists()

    (raw_copy / "ade20k" / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    other = point_dense(verify_ade20k(raw_copy / "ade20k"), tmp_path / "again" / "ade20k")
    assert other.digest != manifest.digest

    for part in ("images/training/ADE_train_00000001.jpg", "annotations/training/ADE_train_00000001.png"):
        (raw_copy / "ade20k" / part).unlink()
    with pytest.raises(DatasetError, match="has changed since it was prepared"):
        open_dense(tmp_path, "ade20k", tmp_path / "scratch")
    raw_copy.rename(tmp_path / "moved")
    with pytest.raises(DatasetError, match="prepared folder of 'ade20k' is missing"):
        open_dense(tmp_path, "ade20k", tmp_path / "scratch")


def test_a_set_of_another_kind_is_named(raw, tmp_path):
    pack_dense(verified("ade20k", raw / "ade20k", "rooms"), tmp_path / "rooms")
    assert read_manifest(tmp_path / "rooms", DenseManifest).layout == "ade20k"
    assert open_dense(tmp_path, "rooms", tmp_path / "scratch", "ade20k").counts["train_images"] == 6
    with pytest.raises(DatasetError, match="'rooms' is a set of another kind: ade20k instead of coco"):
        open_dense(tmp_path, "rooms", tmp_path / "scratch", "coco")
    with pytest.raises(DatasetError, match=r"'rooms' is not a set of images with classes.*layout of ade20k"):
        open_shards(tmp_path, "rooms", "train")
    with pytest.raises(DatasetError, match="There is no layout 'kitti'"):
        verified("kitti", raw / "ade20k", "rooms")
