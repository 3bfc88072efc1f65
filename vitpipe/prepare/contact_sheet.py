"""A contact sheet: samples of every prepared set in one picture, with boxes, masks and label maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitpipe.config.data import DENSE_SETS, SHARD_SETS
from vitpipe.contracts.seeds import generator_of
from vitpipe.data.manifest import DataManifest, read_manifest
from vitpipe.data.shards import open_shards
from vitpipe.datasets.dense_folder import DenseFolder, open_dense

_CELL, _GAP, _TEXT, _TITLE = 160, 6, 16, 26
_PAPER, _INK = (250, 250, 250), (30, 30, 30)
# Colours that stay apart for the colour-blind (Okabe and Ito, 2008).
_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

Cell = tuple[Image.Image, str]
Row = tuple[str, list[Cell]]


def contact_sheet(
    prepare_folder: Path, out_png: Path, *, scratch: Path, num_images: int = 12, seed: int = 0
) -> None:
    """Draw `num_images` samples per set, half of them from val, into one PNG.

    Args:
        prepare_folder: output of the prepare stage.
        scratch: where archived dense sets are unpacked to.
        seed: chooses the samples.

    Raises:
        DatasetError: when a set cannot be read.
    """
    prepared = read_manifest(prepare_folder, DataManifest).sets
    rows = [_class_row(prepare_folder, name, num_images, seed) for name in SHARD_SETS if name in prepared]
    painters: dict[str, Callable[[DenseFolder, int, int], list[Cell]]] = {
        "coco": _coco_cells,
        "ade20k": _ade_cells,
        "davis": _davis_cells,
    }
    for name in DENSE_SETS:
        if name in prepared:
            dense = open_dense(prepare_folder, name, scratch)
            counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in dense.counts.items())
            rows.append((f"{name}: {counts}", painters[name](dense, num_images, seed)))
    _lay_out(rows, num_images).save(out_png, "PNG")


def overlay(image: Image.Image, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Image.Image:
    """Tint the (H, W) mask and draw its outline."""
    pixels = np.array(image)
    pixels[mask] = pixels[mask] // 2 + np.array(colour, np.uint8) // 2
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    pixels[mask & ~inner] = colour
    return Image.fromarray(pixels)


def _class_row(folder: Path, dataset: str, num_images: int, seed: int) -> Row:
    cells: list[Cell] = []
    sizes = []
    for split, count in (("train", num_images - num_images // 2), ("val", num_images // 2)):
        shards = open_shards(folder, dataset, split)
        sizes.append(f"{len(shards):,} {split} images")
        names = shards.class_names or shards.classes
        for position in _choose(len(shards), count, seed, dataset, split):
            image, label = shards.decode(position)
            cells.append((image, f"{split}: {names[label]}"))
    return f"{dataset}: {', '.join(sizes)}, {len(shards.classes)} classes", cells


def _coco_cells(dense: DenseFolder, num_images: int, seed: int) -> list[Cell]:
    cells: list[Cell] = []
    for split, count in (("train", num_images - num_images // 2), ("val", num_images // 2)):
        content = json.loads((dense.root / "annotations" / f"instances_{split}2017.json").read_bytes())
        names = {category["id"]: category["name"] for category in content["categories"]}
        annotations: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            annotations.setdefault(annotation["image_id"], []).append(annotation)
        for position in _choose(len(content["images"]), count, seed, "coco", split):
            entry = content["images"][position]
            image = _open(dense.root / f"{split}2017" / entry["file_name"])
            own = annotations.get(entry["id"], [])
            cells.append((_draw_objects(image, own, names), f"{split}: {len(own)} objects"))
    return cells


def _draw_objects(
    image: Image.Image, annotations: list[dict[str, Any]], names: dict[int, str]
) -> Image.Image:
    """Masks, boxes and names on a picture enlarged to the cell, so that lines stay thin."""
    scale = _CELL / max(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    for number, annotation in enumerate(annotations):
        colour = _COLOURS[number % len(_COLOURS)]
        mask = _mask_of(annotation["segmentation"], image.size, scale)
        image = overlay(image, mask, colour)
    draw = ImageDraw.Draw(image)
    for number, annotation in enumerate(annotations):
        colour = _COLOURS[number % len(_COLOURS)]
        x, y, width, height = (value * scale for value in annotation["bbox"])
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=colour)
        name = names[annotation["category_id"]] + (" crowd" if annotation["iscrowd"] else "")
        draw.text((x + 2, y), name, fill="white", font=_font(11), stroke_width=1, stroke_fill="black")
    return image


def _mask_of(segmentation: Any, size: tuple[int, int], scale: float) -> NDArray[np.bool_]:
    """Polygons or uncompressed run lengths as a mask of the enlarged picture, (H, W)."""
    if isinstance(segmentation, dict):
        height, width = segmentation["size"]
        counts = segmentation["counts"]
        if not isinstance(counts, list):
            return np.zeros(size[::-1], bool)
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        mask = Image.fromarray(flat.reshape(width, height).T.astype(np.uint8))
        return np.asarray(mask.resize(size, Image.Resampling.NEAREST)).astype(bool)
    mask = Image.new("L", size)
    for polygon in segmentation:
        ImageDraw.Draw(mask).polygon([value * scale for value in polygon], fill=1)
    return np.asarray(mask).astype(bool)


def _ade_cells(dense: DenseFolder, num_images: int, seed: int) -> list[Cell]:
    """Pairs of picture and label map."""
    folders = {"train": "training", "val": "validation"}
    cells: list[Cell] = []
    for split, count in (("train", (num_images + 2) // 4), ("val", num_images // 4)):
        images = sorted((dense.root / "images" / folders[split]).glob("*.jpg"))
        for position in _choose(len(images), count, seed, "ade20k", split):
            labels = np.asarray(
                Image.open(dense.root / "annotations" / folders[split] / f"{images[position].stem}.png")
            )
            found = [label for label in np.unique(labels).tolist() if label]
            names = ", ".join(dense.classes[label - 1] for label in found)
            cells.append((_open(images[position]), split))
            cells.append((Image.fromarray(_label_colours(len(dense.classes))[labels]), names or "other"))
    return cells


def _davis_cells(dense: DenseFolder, num_images: int, seed: int) -> list[Cell]:
    """Frames of the first val sequence over its whole length, with their objects."""
    name = (dense.root / "ImageSets" / "2017" / "val.txt").read_text(encoding="utf-8").split()[0]
    frames = sorted((dense.root / "JPEGImages" / "480p" / name).glob("*.jpg"))
    cells = []
    for position in (
        np.linspace(0, len(frames) - 1, min(num_images, len(frames))).round().astype(int).tolist()
    ):
        image = _open(frames[position])
        labels = np.asarray(
            Image.open(dense.root / "Annotations" / "480p" / name / f"{frames[position].stem}.png")
        )
        for number in (n for n in np.unique(labels).tolist() if n):
            image = overlay(image, labels == number, _COLOURS[number % len(_COLOURS)])
        cells.append((image, f"{name} {frames[position].stem}"))
    return cells


def _label_colours(num_classes: int) -> NDArray[np.uint8]:
    """One colour per label, (num_classes + 1, 3); 0 is black."""
    colours = generator_of("label colours").integers(60, 256, (num_classes + 1, 3)).astype(np.uint8)
    colours[0] = 0
    return colours


def _lay_out(rows: list[Row], num_columns: int) -> Image.Image:
    num_columns = min(num_columns, 12)
    heights = [_TITLE + -(-len(cells) // num_columns) * (_CELL + _TEXT + _GAP) for _, cells in rows]
    sheet = Image.new("RGB", (num_columns * (_CELL + _GAP) + _GAP, sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for (title, cells), height in zip(rows, heights, strict=True):
        draw.text((_GAP, top), title, fill=_INK, font=_font(16))
        for number, (image, caption) in enumerate(cells):
            x = _GAP + (number % num_columns) * (_CELL + _GAP)
            y = top + _TITLE + (number // num_columns) * (_CELL + _TEXT + _GAP)
            scale = _CELL / max(image.size)
            fitted = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
            sheet.paste(fitted, (x, y))
            draw.text((x, y + fitted.height), _shorten(caption), fill=_INK, font=_font(11))
        top += height
    return sheet


def _shorten(caption: str) -> str:
    """As much of the caption as fits below a cell."""
    font = _font(11)
    while font.getlength(caption) > _CELL:
        caption = caption.rstrip("…")[:-1] + "…"
    return caption


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _choose(num_items: int, count: int, seed: int, *purpose: str) -> list[int]:
    generator = generator_of("contact sheet", seed, *purpose)
    return generator.permutation(num_items)[:count].tolist()
