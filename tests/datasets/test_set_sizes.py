"""A plan counts what is there: prepared sets, else the user's folder, else the release's numbers."""

from __future__ import annotations

import pytest
from PIL import Image

from vitpipe.config.data import DataConfig
from vitpipe.datasets.layouts import verified
from vitpipe.datasets.set_sizes import prepared_train_sizes, sized_facts, train_sizes
from vitpipe.prepare.dense_sets import pack_dense


@pytest.fixture
def own_imagenet(tmp_path):
    """Two of ImageNet's classes: three training and two validation pictures each."""
    for split, number in (("train", 3), ("val", 2)):
        for key in ("n01440764", "n01443537"):
            folder = tmp_path / "imagenet" / split / key
            folder.mkdir(parents=True)
            for place in range(number):
                Image.new("RGB", (16, 16)).save(folder / f"{place}.JPEG")
    return DataConfig(source="folders", root=tmp_path, sets=["imagenet"])


def test_class_folders_are_counted_instead_of_looked_up(own_imagenet):
    assert train_sizes(own_imagenet, ["imagenet"]) == {"imagenet": 6}
    assert sized_facts("imagenet", own_imagenet).num_val_images == 4
    elsewhere = own_imagenet.model_copy(update={"root": own_imagenet.root / "nowhere"})
    assert train_sizes(elsewhere, ["imagenet"]) == {"imagenet": 1_281_167}


def test_a_folder_of_millions_is_not_listed(own_imagenet, monkeypatch):
    monkeypatch.setattr("vitpipe.datasets.set_sizes._MAX_LISTED", 5)
    assert train_sizes(own_imagenet, ["imagenet"]) == {"imagenet": 1_281_167}


def test_a_set_that_is_wrong_is_planned_by_the_release_s_numbers(own_imagenet):
    (own_imagenet.root / "imagenet" / "train" / "n09999999").mkdir()
    assert train_sizes(own_imagenet, ["imagenet"]) == {"imagenet": 1_281_167}


def test_dense_sets_are_counted_where_they_are_small(raw):
    data = DataConfig(source="folders", root=raw, sets=["coco", "ade20k"])
    assert train_sizes(data, ["coco", "ade20k"]) == {"coco": 6, "ade20k": 6}


def test_the_manifests_of_a_finished_stage_are_read(raw, tmp_path):
    from vitpipe.data.manifest import DataManifest, write_manifest

    folder = tmp_path / "prepare"
    digest = pack_dense(verified("ade20k", raw / "ade20k", "ade20k"), folder / "ade20k").digest
    write_manifest(folder, DataManifest(source="folders", sets={"ade20k": digest}, data_digest="d"))
    assert prepared_train_sizes(folder) == {}, "without a card the stage has not finished"
    (folder / "card.json").write_text("{}")
    assert prepared_train_sizes(folder) == {"ade20k": 6}
    (folder / "ade20k" / "manifest.json").write_text("{")
    assert prepared_train_sizes(folder) == {}
