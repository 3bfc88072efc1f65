"""The estimate of packing: sizes as in a real shard, hours from a measured speed."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from vitpipe.config.data import EMBEDDED_SETS, DataConfig
from vitpipe.config.resolve import num_packers
from vitpipe.contracts.errors import InputError
from vitpipe.datasets.catalogue import FACTS, facts
from vitpipe.prepare.packing_cost import (
    PackSpeed,
    pack_speed,
    packing_cost,
    plan_rows,
    shown_rows,
    speed_file,
    write_pack_speed,
)

SPEED = PackSpeed(images_per_second_per_core=1000, megabytes_per_second_per_core=100)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPIPE_CACHE", str(tmp_path / "cache"))


def cost_of(name, **fields):
    return packing_cost(DataConfig(root="x", sets=(name,), workers=1, **fields), SPEED)[0]


def test_imagenet_in_numbers():
    cost = cost_of("imagenet")
    assert (cost.num_train, cost.num_val) == (1_281_167, 50_000)
    assert cost.source_bytes == 154_642_401_280
    overhead = cost.packed_bytes - cost.source_bytes
    assert 1.7e3 < overhead / 1_331_167 < 1.9e3, "header, padding, label and index record of one image"
    # 148.8 GB and 8 GB in shards of 256 MB.
    assert cost.num_shards == 591 + 24 or abs(cost.num_shards - cost.packed_bytes / 256e6) < 3
    assert cost.hours == pytest.approx(154_642.4 / 100 / 3600, rel=1e-4), "bytes are the slower limit"
    assert cost.disk_bytes == cost.packed_bytes
    assert cost.note == ""


def test_small_images_are_limited_by_their_number():
    cost = cost_of("cifar10")
    assert cost.hours == pytest.approx(60_000 / 1000 / 3600)
    assert "PNG" in cost.note
    assert cost.num_shards == 2


def test_cores_divide_the_time():
    none, one, four = (
        packing_cost(DataConfig(root="x", sets=("imagenet",), workers=workers), SPEED)[0].hours
        for workers in (0, 1, 4)
    )
    assert one == pytest.approx(4 * four)
    assert none == one, "the process of the stage packs then"
    assert 1 <= num_packers(DataConfig(root="x")) <= os.cpu_count()


def test_a_shorter_side_makes_shards_smaller_and_is_marked_as_an_estimate():
    whole, small = cost_of("imagenet"), cost_of("imagenet", short_side=256)
    assert 0.4 < small.packed_bytes / whole.packed_bytes < 0.55
    assert "estimate" in small.note
    assert cost_of("imagenet", short_side=1000).packed_bytes == whole.packed_bytes
    assert "unknown" in cost_of("domainnet_sketch", short_side=128).note


def test_shards_of_another_size():
    assert cost_of("imagenet", shard_megabytes=1000).num_shards < cost_of("imagenet").num_shards / 3.5


def test_dense_sets_are_used_in_place_or_packed(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "ade20k").mkdir()
    (tmp_path / "ade20k" / "ADEChallengeData2016.zip").touch()
    data = DataConfig(root=tmp_path, sets=("coco", "ade20k"))
    coco, ade = packing_cost(data, SPEED)
    assert (coco.packed_bytes, coco.num_shards, coco.hours, coco.disk_bytes) == (0, 0, 0.0, 0)
    assert "used in place" in coco.note
    assert ade.packed_bytes > ade.source_bytes, "archives are packed"
    assert cost_of("coco", keep_dense="pack").num_shards == 1


def test_embedded_pinned_and_stored():
    data = DataConfig(source="embedded", sets=EMBEDDED_SETS)
    for cost in packing_cost(data, SPEED):
        assert cost.num_train == facts(cost.dataset, data).num_train_images
        assert cost.disk_bytes == cost.packed_bytes + cost.source_bytes, "written as folders first"
    pinned = {"repo": "r", "revision": "v1", "path": "p"}
    pulled = packing_cost(DataConfig(source="pinned", pinned=pinned, sets=("svhn", "coco")), SPEED)
    assert [cost.hours for cost in pulled] == [0.0, 0.0]
    assert all("pulled" in cost.note for cost in pulled)
    stored = cost_of("imagenet22k", store="s3://bucket/prefix")
    assert stored.disk_bytes == stored.packed_bytes, "a set is uploaded when it is complete"
    assert "s3://bucket/prefix" in stored.note


def test_the_measured_speed_is_kept_and_used():
    assert "default" in str(pack_speed())
    measured = PackSpeed(
        images_per_second_per_core=250, megabytes_per_second_per_core=30, measured_at="2026-11-20T10:00:00", cores=2
    )  # fmt: skip
    assert write_pack_speed(measured) == speed_file()
    assert pack_speed() == measured
    assert "measured 2026-11-20" in str(pack_speed())
    data = DataConfig(root="x", sets=("imagenet",), workers=1)
    assert packing_cost(data)[0].hours == pytest.approx(1_331_167 / 250 / 3600), "images are the slower limit"


@pytest.mark.parametrize("content", ["", "{}", '{"images_per_second_per_core": -1}', "not json"])
def test_a_damaged_speed_file_is_named(content):
    speed_file().parent.mkdir(parents=True)
    speed_file().write_text(content)
    with pytest.raises(InputError, match=r"pack-speed\.json.*benchmark pack"):
        pack_speed()


def test_rows_for_json_and_for_the_terminal():
    data = DataConfig(root="x", sets=tuple(FACTS))
    rows = plan_rows(data, SPEED)
    assert [row["dataset"] for row in rows] == list(data.sets)
    assert all(isinstance(row["hours"], float) for row in rows)
    shown = shown_rows(data, SPEED)
    assert shown[-1]["set"] == "all"
    assert len(shown) == len(rows) + 1
    assert {row["set"]: row["source"] for row in shown}["imagenet"] == "154.6 GB"
    assert len(shown_rows(DataConfig(root="x", sets=("svhn",)), SPEED)) == 1


def test_the_estimate_matches_a_written_shard(tmp_path):
    """Against the writer: random images of known sizes."""
    from vitpipe.prepare.shard_writer import PackJournal, open_writer

    sizes = np.random.default_rng(0).integers(2000, 9000, 200)
    (tmp_path / "out").mkdir()
    with open_writer(tmp_path / "out", "train", PackJournal(tmp_path / "journal"), hashed=False) as writer:
        for number, size in enumerate(sizes.tolist()):
            writer.add(f"{number}.JPEG", number % 10, bytes(size))
        writer.close_shard()
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    known = facts("imagenet")
    per_image = (cost_of("imagenet").packed_bytes - known.size_bytes) / known.num_images
    assert written == pytest.approx(sizes.sum() + 200 * per_image, rel=0.01)


def test_small_images_as_png_are_close_to_the_estimate():
    path = facts("cifar10").array_side
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).resize((path, path))
    )
    noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    from vitpipe.datasets.sources.byte_ranges import Pixels

    size = len(Pixels(noisy.tobytes(), path, path).read())
    assert 0.5 < size / (3 * path**2) < 1.05
