import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.data import shards as shards_module
from vitpipe.data.manifest import read_digest
from vitpipe.data.pack import INDEX_RECORD, Quarantine, pack
from vitpipe.data.shards import INDEX_DTYPE, ShardSet, open_shards, verify_checksums
from vitpipe.data.verify import verify_class_folders
from vitpipe.errors import DatasetError


def test_any_position_gives_the_original_file(raw, prepared):
    for split in ("train", "val"):
        shards = open_shards(prepared, "imagenet", split)
        originals = sorted((raw / "imagenet" / split).rglob("*.JPEG"))
        assert len(shards) == len(originals)
        for position in np.random.default_rng(0).permutation(len(shards)).tolist():
            sample = shards.read(position)
            assert sample.image_bytes == originals[position].read_bytes()
            assert shards.classes[sample.label] == originals[position].parent.name
            assert sample.key == f"{position:09d}-{originals[position].stem}"
        assert shards.labels.tolist() == [shards.read(position).label for position in range(len(shards))]


@given(st.tuples(*[st.integers(0, 2**bits - 1) for bits in (64, 32, 32, 32, 32)]))
def test_the_writer_and_the_reader_agree_on_the_index(record):
    assert np.frombuffer(INDEX_RECORD.pack(*record), INDEX_DTYPE).item() == record


def test_many_shards_with_few_open_files(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_MAX_OPEN_SHARDS", 2)
    layout = verify_class_folders(raw / "imagenet", "imagenet")
    manifest = pack(layout, tmp_path / "packed", shard_bytes=1, quarantine=Quarantine(0))
    shards = ShardSet(tmp_path / "packed", manifest, "train")
    assert len(shards.manifest.shards) == len(shards) == 30
    for position in (29, 0, 7, 29, 3):
        assert shards.read(position).label == int(shards.labels[position])
        assert len(shards._files) <= 2
    shards.close()
    assert shards.read(5).key.startswith("000000005-")


def test_a_set_travels_to_another_process(prepared):
    shards = open_shards(prepared, "imagenet", "val")
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(3) == shards.read(3)


def test_a_set_that_was_not_prepared(prepared, tmp_path):
    with pytest.raises(DatasetError, match=r"'imagenet' is not in the prepared data.*data\.sets"):
        open_shards(tmp_path, "imagenet", "train")
    with pytest.raises(DatasetError, match="no split 'test'"):
        open_shards(prepared, "imagenet", "test")


def test_a_damaged_manifest(prepared_copy):
    (prepared_copy / "imagenet" / "manifest.json").write_text('{"dataset": "imagenet"}')
    with pytest.raises(DatasetError, match="manifest is damaged"):
        open_shards(prepared_copy, "imagenet", "train")


@pytest.mark.parametrize("change", ["truncate", "remove"])
def test_a_truncated_or_missing_shard(prepared_copy, change):
    shard = prepared_copy / "imagenet" / "train-000000.tar"
    if change == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    words = "bytes instead of" if change == "truncate" else "is missing"
    with pytest.raises(DatasetError, match=rf"{words}.*train-000000\.tar.*prepare stage again"):
        open_shards(prepared_copy, "imagenet", "train")


def test_a_truncated_index(prepared_copy):
    index = prepared_copy / "imagenet" / "train.index"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DatasetError, match="index is missing or incomplete"):
        open_shards(prepared_copy, "imagenet", "train")


def test_changed_bytes_are_noticed_when_read_and_when_verified(prepared_copy):
    assert verify_checksums(prepared_copy, "imagenet") > 0
    shard = prepared_copy / "imagenet" / "val-000000.tar"
    shards = open_shards(prepared_copy, "imagenet", "val")
    offset = int(shards._records["offset"][4])
    content = bytearray(shard.read_bytes())
    content[offset + 30] ^= 1
    shard.write_bytes(content)
    assert shards.read(3).label == int(shards.labels[3])
    with pytest.raises(DatasetError, match=r"image 4 has changed.*val-000000\.tar"):
        shards.read(4)
    with pytest.raises(DatasetError, match=r"Checksums differ: val-000000\.tar\."):
        verify_checksums(prepared_copy, "imagenet")


def test_a_shard_that_vanishes_while_in_use(prepared_copy):
    shards = open_shards(prepared_copy, "imagenet", "val")
    (prepared_copy / "imagenet" / "val-000000.tar").unlink()
    with pytest.raises(DatasetError, match="cannot be opened"):
        shards.read(0)


def test_an_image_that_no_longer_decodes_is_named(prepared, monkeypatch):
    shards = open_shards(prepared, "imagenet", "val")
    sample = shards.read(2)
    monkeypatch.setattr(shards, "read", lambda position: sample._replace(image_bytes=b"nothing"))
    with pytest.raises(DatasetError, match=rf"{sample.key}.*cannot be decoded.*position 2"):
        shards.decode(2)


def test_the_digest_of_the_whole(prepared, prepared_copy):
    assert read_digest(prepared) == read_digest(prepared_copy)
    (prepared_copy / "manifest.json").unlink()
    with pytest.raises(DatasetError):
        read_digest(prepared_copy)
