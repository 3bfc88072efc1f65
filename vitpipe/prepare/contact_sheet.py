"""A contact sheet: samples of every prepared set in one PNG, with boxes, masks and label maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.contracts.seeds import generator_of
from vitpipe.contracts.units import counted
from vitpipe.data.image_grid import (
    DrawnObject,
    Pixels,
    Section,
    Tile,
    class_colours,
    draw_labels,
    draw_masks,
    draw_objects,
    fit,
    legend_of,
    rgb,
    write_grid,
)
from vitpipe.data.image_pixels import rgb_file
from vitpipe.data.manifest import ShardManifest
from vitpipe.data.shards import open_shards
from vitpipe.datasets.dense_folder import DenseFolder, open_dense
from vitpipe.datasets.layouts.coco_annotations import read_annotations
from vitpipe.datasets.layouts.coco_outlines import mask_of
from vitpipe.datasets.layouts.davis import listed_sequences
from vitpipe.datasets.layouts.file_tree import FolderTree
from vitpipe.prepare.set_summary import read_prepared

# Tiles, and colours with their names.
_Samples = tuple[list[Tile], Sequence[tuple[tuple[int, int, int], str]]]
# Six tiles are about 1,000 pixels, which a page shows without shrinking their captions. With the default of
# 12 samples the first row is from train and the second from val.
_TILE, _COLUMNS = 160, 6
# Objects have no frame there: the tint alone must show them.
_DAVIS_OPACITY = 0.6
# Objects are told apart by these, which the colour-blind can (Okabe and Ito, Color Universal Design, 2008).
_OBJECT_COLOURS = np.array(
    [
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
    ],
    np.uint8,
)


def contact_sheet(
    prepare_folder: Path, out_png: Path, *, scratch: Path, num_images: int = 12, seed: int = 0
) -> None:
    """Draw `num_images` samples per set, half of them from val, into one PNG.

    Args:
        prepare_folder: output of the prepare stage.
        scratch: folder into which archived dense sets are unpacked.
        seed: chooses the samples.

    Raises:
        DatasetError: when a set cannot be read.
        StorageError: when the disk is full or cannot be written.
    """
    prepared = read_prepared(prepare_folder)
    sections = [
        _class_section(prepare_folder, name, num_images, seed)
        for name, manifest in prepared.items()
        if isinstance(manifest, ShardManifest)
    ]
    samplers: dict[str, Callable[[DenseFolder, int, int], _Samples]] = {
        "coco": _coco_tiles,
        "ade20k": _ade_tiles,
        "davis": _davis_tiles,
    }
    for name, manifest in prepared.items():
        sampler = None if isinstance(manifest, ShardManifest) else samplers.get(manifest.layout or name)
        # A plugin's layout has no pictures here.
        if sampler is not None:
            dense = open_dense(prepare_folder, name, scratch)
            counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in dense.counts.items())
            tiles, legend = sampler(dense, num_images, seed)
            sections.append(Section(f"{name}: {counts}", tiles, legend=legend))
    note = (
        f"Samples of every set, drawn by seed {seed}, half of them for training, half for validation; "
        "tinted: what is annotated."
    )
    write_grid(out_png, sections, columns=_COLUMNS, note=note)


def _class_section(folder: Path, dataset: str, num_images: int, seed: int) -> Section:
    tiles: list[Tile] = []
    sizes = []
    for split, count in (("train", num_images - num_images // 2), ("val", num_images // 2)):
        shards = open_shards(folder, dataset, split)
        sizes.append(f"{len(shards):,} {split} images")
        names = shards.class_names or shards.classes
        for position in _choose(len(shards), count, seed, dataset, split):
            image, label = shards.decode(position)
            tiles.append(Tile(fit(np.asarray(image.convert("RGB")), _TILE), f"{split}: {names[label]}"))
    return Section(
        f"{dataset}: {', '.join(sizes)}, {counted(len(shards.classes), 'class', 'classes')}", tiles
    )


def _coco_tiles(dense: DenseFolder, num_images: int, seed: int) -> _Samples:
    tiles: list[Tile] = []
    for split, count in (("train", num_images - num_images // 2), ("val", num_images // 2)):
        content = read_annotations(FolderTree(dense.root), split, outlines=True).content
        names = {category["id"]: category["name"] for category in content["categories"]}
        annotations: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
        for position in _choose(len(content["images"]), count, seed, "coco", split):
            entry = content["images"][position]
            image = _open(dense.root / f"{split}2017" / entry["file_name"])
            own = annotations.get(entry["id"], [])
            objects = [
                _drawn_object(number, annotation, names, image) for number, annotation in enumerate(own)
            ]
            caption = f"{split}: {counted(len(own), 'object')}"
            tiles.append(Tile(draw_objects(image, objects, _OBJECT_COLOURS, _TILE), caption))
    return tiles, ()


def _drawn_object(
    number: int, annotation: dict[str, Any], names: dict[int, str], image: Pixels
) -> DrawnObject:
    """One annotation of COCO; its box is (x, y, width, height)."""
    x, y, width, height = annotation["bbox"]
    name = names[annotation["category_id"]]
    return DrawnObject(
        number % len(_OBJECT_COLOURS),
        (x, y, x + width, y + height),
        mask_of(annotation["segmentation"], image.shape[0], image.shape[1]),
        f"crowd of {name}" if annotation["iscrowd"] else name,
    )


def _ade_tiles(dense: DenseFolder, num_images: int, seed: int) -> _Samples:
    """Pairs of an image and the same image tinted by its label map, with the colours of the classes."""
    folders = {"train": "training", "val": "validation"}
    colours = class_colours(len(dense.classes))
    tiles: list[Tile] = []
    maps: list[NDArray[np.int64]] = []
    # A sample takes two tiles, so a quarter of the number comes from each split.
    for split, count in (("train", (num_images + 2) // 4), ("val", num_images // 4)):
        images = sorted((dense.root / "images" / folders[split]).glob("*.jpg"))
        for position in _choose(len(images), count, seed, "ade20k", split):
            image = _open(images[position])
            place = dense.root / "annotations" / folders[split] / f"{images[position].stem}.png"
            # Label 0 is "other objects": not a class, hence without a colour (index -1).
            labels = _read_labels(place) - 1
            maps.append(labels)
            tiles.append(Tile(fit(image, _TILE), split))
            tiles.append(Tile(fit(draw_labels(image, labels, colours), _TILE), "annotated"))
    return tiles, legend_of(maps, colours, dense.classes, ignored="other")


def _davis_tiles(dense: DenseFolder, num_images: int, seed: int) -> _Samples:
    """Frames of the first val sequence, evenly spaced over its length, with their objects."""
    listing = dense.root / "ImageSets" / "2017" / "val.txt"
    name = listed_sequences(listing.read_bytes(), listing)[0]
    frames = sorted((dense.root / "JPEGImages" / "480p" / name).glob("*.jpg"))
    positions = np.linspace(0, len(frames) - 1, min(num_images, len(frames))).round().astype(int)
    tiles = []
    for position in positions.tolist():
        frame = frames[position]
        labels = _read_labels(dense.root / "Annotations" / "480p" / name / f"{frame.stem}.png")
        # DAVIS numbers objects from 1; 0 is background.
        numbers = [number for number in np.unique(labels).tolist() if number]
        masks = [labels == number for number in numbers]
        colours = [rgb(_OBJECT_COLOURS[number % len(_OBJECT_COLOURS)]) for number in numbers]
        tinted = draw_masks(_open(frame), masks, colours, _DAVIS_OPACITY)
        tiles.append(Tile(fit(tinted, _TILE), f"{name} {frame.stem}"))
    return tiles, ()


def _open(path: Path) -> Pixels:
    return np.asarray(rgb_file(path))


def _read_labels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as image:
        return np.asarray(image).astype(np.int64)


def _choose(num_items: int, count: int, seed: int, *purpose: str) -> list[int]:
    generator = generator_of("contact sheet", seed, *purpose)
    return generator.permutation(num_items)[:count].tolist()
