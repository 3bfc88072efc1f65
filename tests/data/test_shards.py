import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_shards import picture, write_set

from vitpipe.contracts.errors import DatasetError
from vitpipe.data.manifest import read_digest
from vitpipe.data.shards import INDEX_DTYPE, ShardSet, open_shards, verify_checksums
from vitpipe.prepare.shard_writer import INDEX_RECORD


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


def test_many_at_once_come_in_the_order_asked_for(tmp_path):
    write_set(tmp_path)
    shards = open_shards(tmp_path, "imagenet", "train")
    positions = (29, 3, 3, 0, 17)
    assert [sample.image_bytes for sample in shards.read_many(positions)] == [picture(n) for n in positions]
    assert shards.read_many(positions) == [shards.read(position) for position in positions]
    assert shards.read_many(()) == []


def test_an_index_of_14_million_entries_is_mapped_and_not_copied(tmp_path):
    manifest = write_set(tmp_path)
    num_images = 14_000_000
    index = tmp_path / "imagenet" / "train.index"
    records = index.read_bytes()
    with index.open("r+b") as file:
        file.truncate(num_images * INDEX_DTYPE.itemsize)
        file.seek((num_images - 30) * INDEX_DTYPE.itemsize)
        file.write(records)
    split = manifest.splits["train"].model_copy(update={"num_images": num_images})
    tracemalloc.start()
    shards = ShardSet(
        tmp_path / "imagenet", manifest.model_copy(update={"splits": {"train": split}}), "train"
    )
    sample = shards.read(num_images - 1)
    assert shards.labels[-3:].tolist() == [0, 1, 2]
    copy = pickle.loads(pickle.dumps(shards))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample.image_bytes == copy.read(num_images - 1).image_bytes == picture(29)
    assert peak < 5_000_000


def test_many_shards_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("vitpipe.data.storage.storage._MAX_OPEN_FILES", 2)
    write_set(tmp_path, per_shard=1)
    shards = open_shards(tmp_path, "imagenet", "train")
    assert len(shards.manifest.shards) == len(shards) == 30
    for position in (29, 0, 7, 29, 3):
        assert shards.read(position).image_bytes == picture(position)
        assert len(shards.storage._files) <= 2
    shards.close()
    assert shards.read(5).key == "000000005-noise"


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
    content[int(shards._records["offset"][5]) - 512] ^= 1  # the name
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match="image 5 has changed"):
        shards.read(5)
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
    monkeypatch.setattr(shards, "read_many", lambda positions: [sample._replace(image_bytes=b"nothing")])
    with pytest.raises(DatasetError, match=rf"{sample.key}.*cannot be decoded.*position 2"):
        shards.decode(2)


def test_the_digest_of_the_whole(prepared, prepared_copy):
    assert read_digest(prepared) == read_digest(prepared_copy)
    (prepared_copy / "manifest.json").unlink()
    with pytest.raises(DatasetError):
        read_digest(prepared_copy)


def test_a_damaged_index_is_named_instead_of_the_shard(tmp_path):
    write_set(tmp_path)
    index = tmp_path / "imagenet" / "train.index"
    content = bytearray(index.read_bytes())
    content[4 * INDEX_DTYPE.itemsize] ^= 0x08  # the offset of the fifth image
    index.write_bytes(content)
    shards = open_shards(tmp_path, "imagenet", "train")
    with pytest.raises(DatasetError, match=r"index.*Where: .*train\.index"):
        shards.read(4)
