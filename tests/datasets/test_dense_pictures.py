"""Pictures of sets with annotations, from the archive or the user's folder: order, workers, damage, messages."""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from s3_server import s3, s3_gate, s3_port  # noqa: F401

from vitpipe.config.digest import file_digest
from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.errors import DatasetError
from vitpipe.data.augment import train_transform
from vitpipe.data.batches import train_batches
from vitpipe.data.low_shot import LowShot
from vitpipe.data.manifest import DenseManifest, read_manifest, write_manifest
from vitpipe.datasets import dense_pictures
from vitpipe.datasets.dense_pictures import open_pictures
from vitpipe.datasets.layouts import coco, verified
from vitpipe.prepare.dense_sets import pack_dense, point_dense
from vitpipe.prepare.payload import keep_in_store

FOLDERS = {
    "coco": {"train": "train2017", "val": "val2017"},
    "ade20k": {"train": "images/training", "val": "images/validation"},
    "davis": {"train": "JPEGImages/480p/digits-train-00", "val": "JPEGImages/480p/digits-val-00"},
}


def quiet(text: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def opened(prepared, tmp_path_factory):
    """COCO's pictures in the archive."""
    return open_pictures(prepared, "coco", tmp_path_factory.mktemp("scratch"), quiet)


@pytest.fixture
def archive(prepared_copy):
    """COCO's archive, free to be damaged."""
    return prepared_copy / "coco" / "coco.tar"


def expected_of(raw, dataset, split):
    """Names and pixels of the files of a split's folder, by name."""
    files = sorted((raw / dataset / FOLDERS[dataset][split]).iterdir())
    return [
        (str(file.relative_to(raw / dataset)), Image.open(file).convert("RGB").tobytes()) for file in files
    ]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("dataset", FOLDERS)
def test_the_pictures_of_every_layout_are_those_of_its_folder(raw, prepared, tmp_path, dataset, split):
    point_dense(verified(dataset, raw / dataset, dataset), tmp_path / "in place" / dataset)
    packed = open_pictures(prepared, dataset, tmp_path, quiet)[split]
    in_place = open_pictures(tmp_path / "in place", dataset, tmp_path, quiet)[split]
    expected = expected_of(raw, dataset, split)
    for found in (packed, in_place):
        assert (found.classes, found.class_names, len(found)) == ((), (), len(expected))
        assert found.labels.tolist() == [0] * len(expected)
        decoded = list(found.decode_many(range(len(found))))
        assert [(image.mode, image.tobytes(), label) for image, label in decoded] == [
            ("RGB", pixels, 0) for _, pixels in expected
        ]
    assert list(in_place.names) == [name for name, _ in expected]
    assert [sample.key for sample in packed.read_many(range(len(packed)))] == list(in_place.names)


@given(st.lists(st.integers(0, 5), max_size=12))
def test_any_positions_in_any_order(opened, positions):
    every = [image.tobytes() for image, _ in opened["train"].decode_many(range(6))]
    found = [image.tobytes() for image, _ in opened["train"].decode_many(positions)]
    assert found == [every[position] for position in positions]


def batches(images, workers):
    return list(
        train_batches(
            images, train_transform(AugmentConfig(), 16), seed=3, global_batch=2, micro_batch=2, rank=0,
            num_ranks=1, start_step=0, num_steps=5, workers=workers,
        )
    )  # fmt: skip


def test_batches_do_not_depend_on_loader_processes_or_on_the_place(opened, raw, tmp_path):
    point_dense(verified("coco", raw / "coco", "coco"), tmp_path / "coco")
    in_place = open_pictures(tmp_path, "coco", tmp_path, quiet)["train"]
    alone = batches(opened["train"], 0)
    for other in (batches(opened["train"], 2), batches(in_place, 2), batches(in_place, 0)):
        for ours, theirs in zip(alone, other, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.indices_B, theirs.indices_B)
            assert ours.labels_B.tolist() == [0, 0]
    copy = pickle.loads(pickle.dumps(opened["train"]))
    assert copy.decode(4)[0].tobytes() == opened["train"].decode(4)[0].tobytes()


def test_a_share_is_any_of_the_pictures(opened):
    share = LowShot(opened["train"], 3, seed=1)
    assert len(share) == 3
    assert share.classes == ()
    wanted = [opened["train"].decode(int(position))[0].tobytes() for position in share.positions]
    assert [image.tobytes() for image, _ in share.decode_many([0, 1, 2])] == wanted


def test_the_archive_is_read_whole_once_and_never_unpacked(prepared, tmp_path, monkeypatch):
    said: list[str] = []
    first = open_pictures(prepared, "coco", tmp_path, said.append)["val"].read(2)
    assert len(said) == 1
    assert "coco: reading " in said[0]
    assert "coco.tar once (" in said[0]
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in (".json", ".index")]
    monkeypatch.setattr(dense_pictures, "walk_tar", lambda source: pytest.fail("read again"))
    assert open_pictures(prepared, "coco", tmp_path, said.append)["val"].read(2) == first
    assert len(said) == 1


@pytest.mark.parametrize("damaged", ["listing", "index", "half"])
def test_a_damaged_list_is_made_again(prepared, tmp_path, damaged):
    expected = open_pictures(prepared, "coco", tmp_path, quiet)["train"].read_many(range(6))
    (listing,) = tmp_path.glob("*.json")
    (index,) = tmp_path.glob("*-train.index")
    if damaged == "listing":
        listing.write_text("{}")
    elif damaged == "index":
        index.write_bytes(bytes(len(index.read_bytes())))
    else:
        index.unlink()
    assert open_pictures(prepared, "coco", tmp_path, quiet)["train"].read_many(range(6)) == expected


def test_another_version_of_the_set_gets_another_list(prepared_copy, tmp_path):
    open_pictures(prepared_copy, "coco", tmp_path / "scratch", quiet)
    folder = prepared_copy / "coco"
    changed = read_manifest(folder, DenseManifest).model_copy(update={"digest": "f" * 64})
    write_manifest(folder, changed)
    assert open_pictures(prepared_copy, "coco", tmp_path / "scratch", quiet)["train"].digest == "f" * 64
    assert len(list((tmp_path / "scratch").glob("*.json"))) == 2


def test_a_picture_that_changes_after_it_was_listed_is_named(prepared_copy, archive, tmp_path):
    found = open_pictures(prepared_copy, "coco", tmp_path, quiet)["train"]
    content = bytearray(archive.read_bytes())
    content[found._records["offset"][3] + 30] ^= 255
    archive.write_bytes(content)
    others = found.read_many((0, 1, 2, 4, 5))
    assert len({sample.image_bytes for sample in others}) == 5
    named = r"The archive cannot be used: the image 'train2017/\d+\.jpg' has changed"
    with pytest.raises(DatasetError, match=named) as caught:
        found.read(3)
    assert not any(sample.key in str(caught.value) for sample in others)
    assert "coco.tar" in str(caught.value.where)
    with pytest.raises(DatasetError, match="has changed since it was packed") as caught:
        batches(found, 1)
    assert "Traceback" not in str(caught.value)


def broken_picture(archive, victim: str) -> None:
    """Cut the content of one member: it stays in the archive, and is no picture any more."""
    members = []
    with tarfile.open(archive) as tar:
        for info in tar.getmembers():
            content = tar.extractfile(info).read()
            members.append((info.name, content[:150] if info.name == victim else content))
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    folder = archive.parent
    manifest = read_manifest(folder, DenseManifest)
    changed = {"archive_sha256": file_digest(archive), "size_bytes": archive.stat().st_size}
    write_manifest(folder, manifest.model_copy(update=changed))


def test_a_picture_that_cannot_be_decoded_is_named(prepared_copy, archive, raw, tmp_path):
    victim = expected_of(raw, "coco", "train")[4][0]
    broken_picture(archive, victim)
    found = open_pictures(prepared_copy, "coco", tmp_path, quiet)["train"]
    with pytest.raises(DatasetError, match=rf"The image '{victim}' cannot be decoded.*raw set"):
        list(found.decode_many((4,)))


def test_pictures_of_a_users_folder_that_are_damaged_or_gone(raw_copy, tmp_path):
    point_dense(verified("coco", raw_copy / "coco", "coco"), tmp_path / "coco")
    found = open_pictures(tmp_path, "coco", tmp_path, quiet)["val"]
    for position, content in ((0, b"no picture"), (1, None)):
        file = raw_copy / "coco" / found.names[position]
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"The image '{found.names[0]}' cannot be decoded"):
        list(found.decode_many((2, 0)))
    with pytest.raises(DatasetError, match=rf"A file cannot be read.*{found.names[1]}"):
        list(found.decode_many((1,)))


def test_an_archive_that_has_changed_is_refused_before_the_first_picture(prepared_copy, archive, tmp_path):
    whole = archive.read_bytes()
    # In a picture, in a header, and in its length: the checksum explains all of them.
    for place in (700, 100):
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(DatasetError, match=r"checksum differs.*coco\.tar"):
            open_pictures(prepared_copy, "coco", tmp_path / "scratch", quiet)
    archive.write_bytes(whole[:-512])
    with pytest.raises(DatasetError, match="archive is missing or has a different size"):
        open_pictures(prepared_copy, "coco", tmp_path / "scratch", quiet)
    archive.unlink()
    with pytest.raises(DatasetError, match="archive is missing or has a different size"):
        open_pictures(prepared_copy, "coco", tmp_path / "scratch", quiet)
    with pytest.raises(DatasetError, match="'coco' is not in the prepared data"):
        open_pictures(tmp_path, "coco", tmp_path / "scratch", quiet)
    assert not (tmp_path / "scratch").exists()


def test_other_numbers_than_the_manifests_and_a_layout_without_pictures(prepared_copy, tmp_path, monkeypatch):
    folder = prepared_copy / "coco"
    manifest = read_manifest(folder, DenseManifest)
    write_manifest(folder, manifest.model_copy(update={"counts": {**manifest.counts, "val_images": 9}}))
    with pytest.raises(DatasetError, match="'coco' has 4 pictures of val, and 9 by its manifest"):
        open_pictures(prepared_copy, "coco", tmp_path, quiet)
    monkeypatch.setattr(coco, "LAYOUT", replace(coco.LAYOUT, pictures=None))
    with pytest.raises(DatasetError, match=r"'coco' cannot be read without its annotations.*`pictures`"):
        open_pictures(prepared_copy, "coco", tmp_path, quiet)


def test_long_names_are_kept(raw_copy, tmp_path):
    """A tar header has two fields for a name of more than 100 bytes."""
    root = raw_copy / "davis"
    long = "s" * 90
    (root / "JPEGImages/480p/digits-train-00").rename(root / "JPEGImages/480p" / long)
    (root / "Annotations/480p/digits-train-00").rename(root / "Annotations/480p" / long)
    (root / "ImageSets/2017/train.txt").write_text(f"{long}\n")
    pack_dense(verified("davis", root, "davis"), tmp_path / "davis")
    found = open_pictures(tmp_path, "davis", tmp_path, quiet)["train"]
    assert [sample.key for sample in found.read_many((0, 2))] == [
        f"JPEGImages/480p/{long}/0000{number}.jpg" for number in (0, 2)
    ]


@pytest.mark.slow
def test_an_archive_in_object_storage_is_read_by_ranges_and_from_the_cache(
    s3,  # noqa: F811
    opened,
    prepared_copy,
    tmp_path,
):
    folder = prepared_copy / "coco"
    kept, num_sent = keep_in_store(folder, read_manifest(folder, DenseManifest), "s3://shards/sets")
    assert (num_sent, kept.store is not None, (folder / "coco.tar").exists()) == (1, True, False)
    found = open_pictures(prepared_copy, "coco", tmp_path, quiet)["train"]
    s3.counts.clear()
    expected = opened["train"].read_many(range(6))
    assert found.read_many(range(6)) == expected
    assert s3.counts == {"RANGE": 6}
    assert found.read_many(range(6)) == expected
    again = open_pictures(prepared_copy, "coco", tmp_path, quiet)["train"]
    assert again.decode(3)[0].tobytes() == opened["train"].decode(3)[0].tobytes()
    assert s3.counts["RANGE"] == 6
    found.close()
    again.close()
