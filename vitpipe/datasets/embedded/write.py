"""Write the embedded dataset to disk, in the layouts of the real sets, so that the same readers read both.

    imagenet/     train/<wnid>/*.JPEG  val/<wnid>/*.JPEG  LOC_synset_mapping.txt      ten classes: digits
    imagenet22k/  the same, fifty classes: digit x background
    coco/         train2017/ val2017/ annotations/instances_{train,val}2017.json
    ade20k/       images/ and annotations/, each training/ validation/; objectInfo150.txt, sceneCategories.txt
    davis/        JPEGImages/480p/<sequence>/  Annotations/480p/<sequence>/  ImageSets/2017/{train,val}.txt

Every image is a function of (seed, set, split, number) alone: the same seed gives the same bytes, and a
larger set begins with the images of a smaller one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.config.data import EmbeddedConfig
from vitpipe.contracts.seeds import generator_of
from vitpipe.datasets.davis_palette import davis_palette
from vitpipe.datasets.embedded.digits import NUM_DIGITS, Split
from vitpipe.datasets.embedded.outlines import bounding_box, polygons, run_lengths
from vitpipe.datasets.embedded.scenes import OTHER, Scene, compose_scene, compose_single, compose_video
from vitpipe.datasets.embedded.textures import TEXTURES

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Indices into `TEXTURES`. The fifty classes use these five backgrounds, the ten classes use all and the
# clutter.
FINE_TEXTURES = (0, 1, 2, 4, 5)
NUM_FINE_CLASSES = NUM_DIGITS * len(FINE_TEXTURES)
SPLITS: tuple[Split, ...] = ("train", "val")
# The ids of COCO's 80 categories run to 90 with gaps. So these have one, to catch readers that use ids as
# class numbers.
COCO_CATEGORY_IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11)
ADE_CLASSES = (*(texture.name for texture in TEXTURES), *WORDS)
_FIRST_DIGIT_LABEL = 1 + len(TEXTURES)
_JPEG_QUALITY = 95  # the largest that Pillow recommends; part of the bytes that tests and digests hold


def write_embedded(root: Path, sets: Iterable[str], config: EmbeddedConfig) -> None:
    """Write the named sets below `root`, which must not contain them yet.

    Args:
        sets: any of imagenet, imagenet22k, coco, ade20k, davis.
    """
    writers: dict[str, Callable[[Path, EmbeddedConfig], None]] = {
        "imagenet": write_imagenet,
        "imagenet22k": write_imagenet22k,
        "coco": write_coco,
        "ade20k": write_ade20k,
        "davis": write_davis,
    }
    for name in sets:
        writers[name](root / name, config)


def write_imagenet(root: Path, config: EmbeddedConfig) -> None:
    """Ten classes: the digit, on any background. Classes are balanced."""
    # Above all offsets of WordNet, so that they cannot be mistaken for real classes.
    wnids = [f"n9990000{digit}" for digit in range(NUM_DIGITS)]
    _write_synsets(root, dict(zip(wnids, (f"digit {word}" for word in WORDS), strict=True)))
    for split, count in zip(SPLITS, (config.train_images, config.val_images), strict=True):
        for number in range(count):
            digit = number % NUM_DIGITS
            generator = generator_of("imagenet", config.seed, split, number)
            image = compose_single(digit, None, split, config.image_size, generator)
            _save_jpeg(image, root / split / wnids[digit] / _imagenet_name(wnids[digit], split, number))


def write_imagenet22k(root: Path, config: EmbeddedConfig) -> None:
    """Fifty classes: digit and background together. Classes are balanced."""
    names = {
        f"n9991{digit}{index:03d}": f"digit {WORDS[digit]} on {TEXTURES[texture].name}"
        for digit in range(NUM_DIGITS)
        for index, texture in enumerate(FINE_TEXTURES)
    }
    _write_synsets(root, names)
    for split, count in zip(SPLITS, (config.intermediate_images, config.val_images), strict=True):
        for number in range(count):
            digit, index = divmod(number % NUM_FINE_CLASSES, len(FINE_TEXTURES))
            wnid = f"n9991{digit}{index:03d}"
            generator = generator_of("imagenet22k", config.seed, split, number)
            texture = TEXTURES[FINE_TEXTURES[index]]
            image = compose_single(digit, texture, split, config.image_size, generator)
            _save_jpeg(image, root / split / wnid / _imagenet_name(wnid, split, number))


def write_coco(root: Path, config: EmbeddedConfig) -> None:
    """Detection and instance segmentation: polygons, crowds as run lengths, images without annotations."""
    categories = [
        {"supercategory": "digit", "id": category, "name": word}
        for category, word in zip(COCO_CATEGORY_IDS, WORDS, strict=True)
    ]
    for split, count in zip(SPLITS, (config.scene_train_images, config.scene_val_images), strict=True):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            scene = _scene("coco", split, number, config)
            # Ids are unique over both splits and do not start at 0, as in COCO.
            image_id = 9 + 2 * number + SPLITS.index(split)
            name = f"{image_id:012d}.jpg"
            _save_jpeg(scene.image, root / f"{split}2017" / name)
            height, width = scene.stuff.shape
            image = {"id": image_id, "file_name": name, "height": height, "width": width, "license": 1}
            images.append(image)
            annotations += _coco_annotations(scene, image_id, 1 + len(annotations))
        content = {
            "info": {"description": "digits scenes: handwritten digits on textures", "year": 2017},
            "licenses": [{"id": 1, "name": "scikit-learn and scikit-image sample data", "url": ""}],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        _write_text(root / "annotations" / f"instances_{split}2017.json", json.dumps(content))


def write_ade20k(root: Path, config: EmbeddedConfig) -> None:
    """Semantic segmentation: label 0 other (ignored), then the backgrounds, then the digits."""
    folders = {"train": "training", "val": "validation"}
    scene_lines, num_images = [], {}
    pixels = np.zeros(1 + len(ADE_CLASSES), np.int64)  # by label, of train
    for split, count in zip(SPLITS, (config.scene_train_images, config.scene_val_images), strict=True):
        present = np.zeros(1 + len(ADE_CLASSES), np.int64)
        for number in range(count):
            scene = _scene("ade20k", split, number, config)
            labels = label_map(scene)
            stem = f"ADE_{split}_{number + 1:08d}"
            _save_jpeg(scene.image, root / "images" / folders[split] / f"{stem}.jpg")
            _save_png(Image.fromarray(labels), root / "annotations" / folders[split] / f"{stem}.png")
            histogram = np.bincount(labels.ravel(), minlength=len(pixels))
            present += histogram > 0
            pixels += histogram if split == "train" else 0
            scene_lines.append(f"{stem} {_main_background(scene)}")
        num_images[split] = present
    # The columns of the original objectInfo150.txt.
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for label, name in enumerate(ADE_CLASSES, start=1):
        ratio, stuff = pixels[label] / max(1, pixels.sum()), int(label < _FIRST_DIGIT_LABEL)
        counts = f"{num_images['train'][label]}\t{num_images['val'][label]}"
        lines.append(f"{label}\t{ratio:.4f}\t{counts}\t{stuff}\t{name}")
    _write_text(root / "objectInfo150.txt", "\n".join(lines) + "\n")
    _write_text(root / "sceneCategories.txt", "\n".join(scene_lines) + "\n")


def write_davis(root: Path, config: EmbeddedConfig) -> None:
    """Video object segmentation: `config.videos` sequences per split; palette indices are object numbers."""
    palette = davis_palette()
    for split in SPLITS:
        names = [f"digits-{split}-{number:02d}" for number in range(config.videos)]
        for number, name in enumerate(names):
            generator = generator_of("davis", config.seed, split, number)
            num_things = int(generator.integers(2, 4))
            frames = compose_video(
                split, config.scene_size, config.video_frames, generator, num_things=num_things
            )
            for time, scene in enumerate(frames):
                labels = np.zeros(scene.stuff.shape, np.uint8)
                for index, thing in enumerate(scene.things, start=1):
                    labels[thing.mask] = index
                picture = Image.fromarray(labels)
                picture.putpalette(palette)
                _save_jpeg(scene.image, root / "JPEGImages" / "480p" / name / f"{time:05d}.jpg")
                _save_png(picture, root / "Annotations" / "480p" / name / f"{time:05d}.png")
        _write_text(root / "ImageSets" / "2017" / f"{split}.txt", "\n".join(names) + "\n")


def label_map(scene: Scene) -> NDArray[np.uint8]:
    """The ADE20K label of every pixel, (H, W) uint8: 0 other, from 1 the backgrounds, then the digits."""
    labels = scene.stuff.copy()
    for thing in scene.things:
        labels[thing.mask] = _FIRST_DIGIT_LABEL + thing.digit
    return labels


def _scene(name: str, split: Split, number: int, config: EmbeddedConfig) -> Scene:
    """The scene with this number; one in 40 is empty, one in 9 has a crowd."""
    # Readers must cope with both: 1,021 of COCO's training images have no annotation.
    generator = generator_of(name, config.seed, split, number)
    num_things = 0 if number % 40 == 1 else int(generator.integers(1, 6))
    with_crowd = number % 9 == 3
    return compose_scene(split, config.scene_size, generator, num_things=num_things, with_crowd=with_crowd)


def _coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    return [
        {
            "id": first_id + offset,
            "image_id": image_id,
            "category_id": COCO_CATEGORY_IDS[thing.digit],
            "bbox": bounding_box(thing.mask),
            "area": float(thing.mask.sum()),
            "iscrowd": int(thing.is_crowd),
            "segmentation": run_lengths(thing.mask) if thing.is_crowd else polygons(thing.mask),
        }
        for offset, thing in enumerate(scene.things)
    ]


def _main_background(scene: Scene) -> str:
    label = int(np.bincount(scene.stuff.ravel()).argmax())
    return "other" if label == OTHER else TEXTURES[label - 1].name


def _imagenet_name(wnid: str, split: Split, number: int) -> str:
    return f"{wnid}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{number + 1:08d}.JPEG"


def _write_synsets(root: Path, names: dict[str, str]) -> None:
    _write_text(root / "LOC_synset_mapping.txt", "".join(f"{wnid} {name}\n" for wnid, name in names.items()))


def _save_jpeg(image: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "JPEG", quality=_JPEG_QUALITY)


def _save_png(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
