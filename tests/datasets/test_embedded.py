import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitpipe.contracts.seeds import generator_of
from vitpipe.datasets.davis_palette import davis_palette
from vitpipe.datasets.embedded.scenes import compose_scene
from vitpipe.datasets.embedded.write import (
    ADE_CLASSES,
    COCO_CATEGORY_IDS,
    NUM_FINE_CLASSES,
    label_map,
    write_embedded,
)


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes(raw, tiny, tmp_path):
    write_embedded(tmp_path, sorted(path.name for path in raw.iterdir()), tiny)
    assert digest(tmp_path) == digest(raw)


def test_another_seed_gives_other_pictures(raw, tiny, tmp_path):
    write_embedded(tmp_path, ["coco"], tiny.model_copy(update={"seed": 1}))
    ours, theirs = digest(tmp_path / "coco"), digest(raw / "coco")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours if name.endswith(".jpg"))


def test_a_larger_set_begins_with_the_smaller_one(raw, tiny, tmp_path):
    write_embedded(tmp_path, ["imagenet"], tiny.model_copy(update={"train_images": 35}))
    ours, theirs = digest(tmp_path / "imagenet"), digest(raw / "imagenet")
    assert theirs.items() <= ours.items()
    assert len(ours) == len(theirs) + 5


def test_imagenet_layouts(raw, tiny):
    for name, num_classes in (("imagenet", 10), ("imagenet22k", NUM_FINE_CLASSES)):
        for split in ("train", "val"):
            folders = sorted(path.name for path in (raw / name / split).iterdir())
            assert len(folders) == num_classes
            assert all(folder.startswith("n") and len(folder) == 9 for folder in folders)
        lines = (raw / name / "LOC_synset_mapping.txt").read_text().splitlines()
        assert [line.split(" ", 1)[0] for line in lines] == folders
    assert len(list((raw / "imagenet" / "train").rglob("*.JPEG"))) == tiny.train_images
    with Image.open(next((raw / "imagenet" / "val").rglob("ILSVRC2012_val_*.JPEG"))) as image:
        assert (image.format, image.mode, min(image.size)) == ("JPEG", "RGB", tiny.image_size)


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 4)])
def test_coco_is_read_by_pycocotools_and_masks_are_the_composition(raw, tiny, split, count):
    coco_api = pytest.importorskip("pycocotools.coco")
    coco = coco_api.COCO(str(raw / "coco" / "annotations" / f"instances_{split}2017.json"))
    assert sorted(coco.cats) == sorted(COCO_CATEGORY_IDS)
    assert len(coco.imgs) == count
    num_crowds = num_empty = 0
    for number, image_id in enumerate(sorted(coco.imgs)):
        entry = coco.imgs[image_id]
        with Image.open(raw / "coco" / f"{split}2017" / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"])
        scene = _composed(tiny, "coco", split, number)
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(scene.things)
        num_empty += not annotations
        for annotation, thing in zip(annotations, scene.things, strict=True):
            np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), thing.mask)
            assert annotation["category_id"] == COCO_CATEGORY_IDS[thing.digit]
            assert annotation["area"] == thing.mask.sum()
            assert (
                bool(annotation["iscrowd"]) == thing.is_crowd == isinstance(annotation["segmentation"], dict)
            )
            num_crowds += thing.is_crowd
    assert num_crowds >= 1
    assert num_empty >= 1


def test_ade20k_labels_cover_the_picture_and_are_the_composition(raw, tiny):
    root = raw / "ade20k"
    info = (root / "objectInfo150.txt").read_text().splitlines()
    assert [line.split("\t")[-1] for line in info] == ["Name", *ADE_CLASSES]
    for split, folder in (("train", "training"), ("val", "validation")):
        for number, path in enumerate(sorted((root / "annotations" / folder).glob("*.png"))):
            with Image.open(path) as picture:
                assert picture.mode == "L"
                labels = np.asarray(picture)
            scene = _composed(tiny, "ade20k", split, number)
            np.testing.assert_array_equal(labels, label_map(scene))
            assert labels.max() <= len(ADE_CLASSES)
            assert (labels > 0).mean() > 0.8
            with Image.open(root / "images" / folder / f"{path.stem}.jpg") as image:
                assert image.size == labels.shape[::-1]


def test_davis_layout_and_palette(raw):
    root = raw / "davis"
    for split in ("train", "val"):
        for name in (root / "ImageSets" / "2017" / f"{split}.txt").read_text().split():
            frames = sorted((root / "JPEGImages" / "480p" / name).iterdir())
            labels = sorted((root / "Annotations" / "480p" / name).iterdir())
            assert (
                [frame.stem for frame in frames]
                == [label.stem for label in labels]
                == ["00000", "00001", "00002"]
            )
            with Image.open(labels[0]) as picture:
                assert picture.mode == "P"
                assert picture.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
                assert set(np.unique(np.asarray(picture))) >= {0, 1}
    assert len(davis_palette()) == 768


def test_annotation_ids_are_unique(raw):
    content = json.loads((raw / "coco" / "annotations" / "instances_train2017.json").read_text())
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert len(set(ids)) == len(ids)


def _composed(tiny, name, split, number):
    """The scene, composed a second time by the rules of embedded/write.py."""
    generator = generator_of(name, tiny.seed, split, number)
    num_things = 0 if number % 40 == 1 else int(generator.integers(1, 6))
    return compose_scene(split, tiny.scene_size, generator, num_things=num_things, with_crowd=number % 9 == 3)
