import json
import shutil

import pytest

from vitpipe.data.catalogue import class_names
from vitpipe.data.verify import (
    VERIFY_DENSE,
    verify_ade20k,
    verify_class_folders,
    verify_coco,
    verify_davis,
)
from vitpipe.errors import DatasetError


def refuse(check, *arguments) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        check(*arguments)
    assert caught.value.mend
    assert caught.value.where
    return caught.value


def test_embedded_layouts_pass(raw):
    layout = verify_class_folders(raw / "imagenet", "imagenet")
    assert layout.classes == tuple(f"n9990000{digit}" for digit in range(10))
    assert sum(1 for _ in layout.files("train")) == 30
    assert layout.notes == ()
    counts = {name: check(raw / name).counts for name, check in VERIFY_DENSE.items()}
    assert counts["coco"]["train_images"] == counts["ade20k"]["train_images"] == 6
    assert counts["davis"] == {
        "train_sequences": 1, "train_images": 3, "val_sequences": 1, "val_images": 3,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["imagenet", "imagenet22k", "coco", "ade20k", "davis"])
def test_a_missing_dataset_says_what_belongs_there(tmp_path, name):
    check = VERIFY_DENSE.get(name, lambda root: verify_class_folders(root, name))
    error = refuse(check, tmp_path / name)
    assert f"'{name}'" in error.what + error.mend
    assert "data.sets" in error.mend


def test_a_flat_val_folder(raw_copy):
    val = raw_copy / "imagenet" / "val"
    for image in list(val.rglob("*.JPEG")):
        image.rename(val / image.name)
    error = refuse(verify_class_folders, raw_copy / "imagenet", "imagenet")
    assert "50 images lie directly in 'val'" in error.what
    assert "ground_truth" in error.mend


def test_no_classes(tmp_path):
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    assert "no class folders" in refuse(verify_class_folders, tmp_path / "imagenet", "imagenet").what


def test_train_without_val(raw_copy):
    shutil.rmtree(raw_copy / "imagenet" / "val")
    error = refuse(verify_class_folders, raw_copy / "imagenet", "imagenet")
    assert error.where.endswith("imagenet/val")


def test_different_classes(raw_copy):
    (raw_copy / "imagenet" / "val" / "n99900003").rename(raw_copy / "imagenet" / "val" / "n99900042")
    error = refuse(verify_class_folders, raw_copy / "imagenet", "imagenet")
    assert "n99900003, n99900042" in error.what


def test_an_empty_class(raw_copy):
    folder = raw_copy / "imagenet" / "train" / "n99900003"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".hidden").touch()
    assert (
        "1 class folders are empty: n99900003"
        in refuse(verify_class_folders, raw_copy / "imagenet", "imagenet").what
    )


def test_imagenet22k_without_val_keeps_a_fixed_share_out(raw_copy):
    root = raw_copy / "imagenet22k"
    shutil.rmtree(root / "val")
    source = next((root / "train" / "n99910000").iterdir())
    for number in range(600):
        shutil.copy(source, source.with_name(f"copy_{number}.JPEG"))
    layout = verify_class_folders(root, "imagenet22k")
    train, val = ({file for _, file in layout.files(split)} for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 650
    assert 0 < len(val) < 20
    assert "kept out of training" in layout.notes[0]


def test_coco_annotations_missing_or_damaged(raw_copy):
    path = raw_copy / "coco" / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:-100])
    assert "damaged" in refuse(verify_coco, raw_copy / "coco").what
    path.write_text("{}")
    assert "images" in refuse(verify_coco, raw_copy / "coco").what
    path.unlink()
    error = refuse(verify_coco, raw_copy / "coco")
    assert "missing" in error.what
    assert "annotations_trainval2017.zip" in error.mend


def test_coco_images_that_are_not_there(raw_copy):
    victim = next((raw_copy / "coco" / "train2017").iterdir())
    victim.unlink()
    error = refuse(verify_coco, raw_copy / "coco")
    assert victim.name in error.what
    shutil.rmtree(raw_copy / "coco" / "train2017")
    assert refuse(verify_coco, raw_copy / "coco").where.endswith("train2017")


@pytest.mark.parametrize(("key", "word"), [("image_id", "images"), ("category_id", "categories")])
def test_coco_annotations_of_something_unknown(raw_copy, key, word):
    path = raw_copy / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0][key] = 999_999
    path.write_text(json.dumps(content))
    assert f"1 {word} that are not listed" in refuse(verify_coco, raw_copy / "coco").what


def test_coco_splits_with_different_categories(raw_copy):
    path = raw_copy / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "person"
    path.write_text(json.dumps(content))
    assert "different categories" in refuse(verify_coco, raw_copy / "coco").what


def test_ade20k_pictures_and_label_maps_must_pair(raw_copy):
    root = raw_copy / "ade20k"
    (root / "annotations" / "validation" / "ADE_val_00000002.png").unlink()
    assert "ADE_val_00000002.png" in refuse(verify_ade20k, root).what
    (root / "images" / "validation" / "ADE_val_00000002.jpg").unlink()
    (root / "images" / "training" / "ADE_train_00000001.jpg").unlink()
    assert "ADE_train_00000001.jpg" in refuse(verify_ade20k, root).what


def test_ade20k_one_folder_too_deep(raw_copy):
    root = raw_copy / "ade20k"
    root.rename(raw_copy / "inner")
    root.mkdir()
    (raw_copy / "inner").rename(root / "ADEChallengeData2016")
    assert "ADEChallengeData2016" in refuse(verify_ade20k, root).mend


def test_ade20k_without_its_list_of_names_has_the_150(raw_copy):
    (raw_copy / "ade20k" / "objectInfo150.txt").unlink()
    assert verify_ade20k(raw_copy / "ade20k").classes == class_names("ade20k")


def test_davis_lists_and_sequences(raw_copy):
    root = raw_copy / "davis"
    shutil.rmtree(root / "Annotations" / "480p" / "digits-val-00")
    assert "digits-val-00" in refuse(verify_davis, root).where
    (root / "JPEGImages" / "480p" / "digits-train-00" / "00003.jpg").touch()
    assert "00003.png" in refuse(verify_davis, root).what
    (root / "ImageSets" / "2017" / "train.txt").unlink()
    assert "list of sequences" in refuse(verify_davis, root).what
