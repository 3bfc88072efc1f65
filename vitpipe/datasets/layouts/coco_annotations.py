"""Read and examine a COCO annotation file in one pass, and repair what has one reading only.

    parse, outlines one by one > images > categories > objects > refusals, remarks

The rules are those of the libraries that read the file later: mmdet's `CocoDataset` for training, the COCO
API's evaluation for AP. A file without anything to repair is used as it is, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.layouts.coco_outlines import Outline, area_of, is_finite, outline_of
from vitpipe.datasets.layouts.file_tree import FileTree, Remark

ANNOTATIONS = "annotations_trainval2017.zip"
SPLITS = ("train", "val")
_SHOWN = 2  # examples per kind of finding
# Pixels by which a box may leave the picture: COCO's own do by rounding.
_SLACK = 2.0
# Share of boxes that leave the picture from which on they are taken for corners, if as corners all fit.
_CORNERS_SHARE = 0.1
# Up to here floats, and so most JSON readers, hold every whole number.
_MAX_WHOLE = 2**53
_Level = Literal["refused", "omitted", "repaired"]
_SAME_RELEASE = "use annotations and images of the same release"
_DETECTS_MASKS = "detection here trains masks: use annotations with a segmentation per object"


@dataclass(frozen=True)
class CocoAnnotations:
    """The annotations of one split.

    Attributes:
        content: `images`, `annotations`, `categories`; objects without `segmentation` unless asked for.
        remarks: what was repaired or left out.
        is_repaired: whether the content differs from the file.
    """

    content: dict[str, list[dict[str, Any]]]
    remarks: tuple[Remark, ...]
    is_repaired: bool


def instances_of(split: str) -> str:
    """Name of a split's annotation file in the set's folder."""
    return f"annotations/instances_{split}2017.json"


def read_annotations(tree: FileTree, split: str, *, outlines: bool = False) -> CocoAnnotations:
    """Read and examine the annotations of a split.

    Args:
        outlines: keep the `segmentation` of every object; nine tenths of the memory.

    Raises:
        DatasetError: the file is missing or damaged, or its content is contradictory or of no use; one error
            names all kinds, each with its count and two examples.
    """
    name = instances_of(split)
    where = tree.where(name)
    if not tree.is_file(name):
        raise DatasetError(
            "The annotations are missing",
            where=where,
            fix=f"put {ANNOTATIONS} into the set's folder, or unpack it there",
        )
    content, has_mark = _parsed(tree.read(name), where, outlines=outlines)
    tally = _Tally(where)
    if has_mark:
        tally.repaired("a byte order mark at the start")
    images = _images(content["images"], f"{split}2017/", tally)
    categories = _categories(content["categories"], tally)
    tally.refuse()  # before the objects, which refer to both
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    _take_whole_numbers(content["annotations"], "annotations", ("image_id", "category_id"), tally)
    _check_references(content["annotations"], {"images": images, "categories": categories}, tally)
    tally.refuse()
    objects = _objects(content["annotations"], sizes, split, tally, outlines=outlines)
    return CocoAnnotations(
        {"images": images, "annotations": objects, "categories": categories},
        tally.remarks(),
        tally.is_repaired,
    )


class _Tally:
    """Counts findings by kind: refusals, omissions (the file stays as it is) and repairs (it does not)."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._found: dict[_Level, dict[str, _Kind]] = {"refused": {}, "omitted": {}, "repaired": {}}

    @property
    def is_repaired(self) -> bool:
        """Whether the content differs from the file."""
        return bool(self._found["repaired"])

    def refused(self, kind: str, example: str, fix: str) -> None:
        """Count something that cannot be used."""
        self._count("refused", kind, example, fix)

    def omitted(self, kind: str, example: str = "", fix: str = "", number: int = 1) -> None:
        """Count something that is not used, while the file stays as it is."""
        self._count("omitted", kind, example, fix, number)

    def repaired(self, kind: str, example: str = "", fix: str = "") -> None:
        """Count something that is used otherwise than the file has it."""
        self._count("repaired", kind, example, fix)

    def refuse(self) -> None:
        """Raise one error for everything that was refused."""
        if kinds := self._found["refused"]:
            raise DatasetError(
                "; ".join(kind.described(name) for name, kind in kinds.items()),
                where=self.where,
                fix="; ".join(dict.fromkeys(kind.fix for kind in kinds.values())),
            )

    def remarks(self) -> tuple[Remark, ...]:
        """One remark per kind of omission and repair."""
        return tuple(
            Remark(kind.described(name), self.where, kind.fix)
            for level in ("omitted", "repaired")
            for name, kind in self._found[level].items()
        )

    def _count(self, level: _Level, name: str, example: str, fix: str, number: int = 1) -> None:
        kind = self._found[level].setdefault(name, _Kind(fix))
        kind.number += number
        if example and len(kind.examples) < _SHOWN:
            kind.examples.append(example)


@dataclass
class _Kind:
    """One kind of finding: how often, the first examples, what to do about it."""

    fix: str
    number: int = 0
    examples: list[str] = field(default_factory=list)

    def described(self, name: str) -> str:
        """The kind with its number and its examples, for a message."""
        shown = f", for example {'; '.join(self.examples)}" if self.examples else ""
        return f"{name} ({self.number:,}){shown}"


def _parsed(data: bytes, where: str, *, outlines: bool) -> tuple[dict[str, list[dict[str, Any]]], bool]:
    """The three lists of the file, each object with its `Outline`; and whether it has a byte order mark."""

    def examined(entry: dict[str, Any]) -> dict[str, Any]:
        # While parsing, to save memory: polygons are nine tenths of COCO's file of 0.5 GB.
        if "segmentation" in entry:
            outline = outline_of(entry.pop("segmentation"))
            if entry.get("area") is None:
                entry["computed_area"] = area_of(outline)
            entry["outline"] = outline if outlines else outline._replace(usable=outline.usable and [])
        return entry

    try:
        content = json.loads(data, object_hook=examined)
        kept = {key: content[key] for key in ("images", "annotations", "categories")}
        for key, listing in kept.items():
            if not isinstance(listing, list) or not all(isinstance(entry, dict) for entry in listing):
                raise TypeError(f"'{key}' must be a list of objects")
    # Damaged, cut off, of another structure, or nested without end (RecursionError of `json`).
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"The annotations are damaged ({type(error).__name__}: {error})",
            where=where,
            fix=f"unpack {ANNOTATIONS} again",
        ) from error
    return kept, data.startswith(b"\xef\xbb\xbf")


def _images(listing: list[dict[str, Any]], folder: str, tally: _Tally) -> list[dict[str, Any]]:
    _take_whole_numbers(listing, "images", ("id", "width", "height"), tally)
    for image in listing:
        name = image.get("file_name")
        if not isinstance(name, str):
            tally.refused("an image without a file_name", _shown(image), _SAME_RELEASE)
        elif name.startswith(folder):
            tally.repaired("a file name with its folder, which is left out", name)
            image["file_name"] = name.removeprefix(folder)
        for side in ("width", "height"):
            if type(image.get(side)) is int and image[side] < 1:
                tally.refused(f"an image whose {side} is not positive", _shown(image), _SAME_RELEASE)
    _refuse_equal(listing, "images", ("id", "file_name"), tally)
    return listing


def _categories(listing: list[dict[str, Any]], tally: _Tally) -> list[dict[str, Any]]:
    """Sorted by id: mmdet numbers the classes in the order of each file, which may differ between splits."""
    _take_whole_numbers(listing, "categories", ("id",), tally)
    for category in listing:
        if not isinstance(category.get("name"), str):
            tally.refused("a category without a name", _shown(category), "name every category")
    _refuse_equal(listing, "categories", ("id", "name"), tally)
    numbers = [category.get("id") for category in listing]
    if not all(type(number) is int for number in numbers):
        return listing  # refused above
    ordered = sorted(listing, key=lambda category: int(category["id"]))
    if ordered != listing:
        tally.repaired("categories that are not in the order of their ids, sorted")
    return ordered


def _take_whole_numbers(
    listing: list[dict[str, Any]], what: str, fields: Iterable[str], tally: _Tally
) -> None:
    """Require whole numbers; 96.0, as pandas and MATLAB write them, is one."""
    for key in fields:
        for entry in listing:
            value = entry.get(key)
            if type(value) is float and value.is_integer() and abs(value) < _MAX_WHOLE:
                entry[key] = int(value)
                tally.repaired(f"a whole number with a decimal point as '{key}' of {what}", str(value))
            elif type(value) is not int or abs(value) >= _MAX_WHOLE:
                kind = f"'{key}' of {what} is not a whole number"
                tally.refused(kind, _shown(entry), f"write '{key}' of {what} as a number, without quotes")


def _refuse_equal(listing: list[dict[str, Any]], what: str, fields: Iterable[str], tally: _Tally) -> None:
    for key in fields:
        seen: set[Any] = set()
        for entry in listing:
            value = entry.get(key)
            if isinstance(value, int | str) and value in seen:
                tally.refused(f"'{key}' of {what} occurs again", str(value), f"give {what} different {key}s")
            elif isinstance(value, int | str):
                seen.add(value)


def _check_references(
    objects: list[dict[str, Any]], listed: dict[str, list[dict[str, Any]]], tally: _Tally
) -> None:
    """Every annotation refers to a listed image and category."""
    for key, what in (("image_id", "images"), ("category_id", "categories")):
        known = {entry.get("id") for entry in listed[what]}
        for entry in objects:
            if type(entry.get(key)) is int and entry[key] not in known:
                kind = f"annotations refer to {what} that are not listed"
                tally.refused(kind, str(entry[key]), _SAME_RELEASE)


def _objects(
    listing: list[dict[str, Any]],
    sizes: dict[int, tuple[int, int]],
    split: str,
    tally: _Tally,
    *,
    outlines: bool,
) -> list[dict[str, Any]]:
    """The objects that can be used; those that mmdet skips by itself stay, with a remark."""
    kept: list[dict[str, Any]] = []
    num_usable = 0
    boxes = _Boxes(tally)
    for entry in listing:
        width, height = sizes[entry["image_id"]]
        outline: Outline = entry.pop("outline", Outline(None, "no outline", None))
        _complete(entry, tally)
        if outline.problem.startswith("run lengths") or outline.size not in (None, (height, width)):
            kind = outline.problem or "run lengths of another size than the picture"
            tally.refused(kind, _shown(entry), "encode the masks again, with 'size' as [height, width]")
            continue
        if outline.usable is None:
            kind = f"an object with {outline.problem}, left out"
            tally.repaired(kind, _shown(entry), _DETECTS_MASKS)
            continue
        if outline.problem:
            tally.repaired(f"an outline with {outline.problem}, which was mended", _shown(entry))
        if outlines:
            entry["segmentation"] = outline.usable
        kept.append(entry)
        num_usable += boxes.is_usable(entry, width, height) and entry.get("iscrowd") == 0
    boxes.refuse_corners()
    _number(kept, tally)
    tally.refuse()
    if not num_usable:
        reasons = [remark.what for remark in tally.remarks()]
        crowds = sum(entry.get("iscrowd") == 1 for entry in kept)
        reasons += [f"{crowds:,} are crowds, which are regions to ignore"] if crowds else []
        raise DatasetError(
            f"{split} has no object to detect ({'; '.join(reasons) or 'it has no annotations'})",
            where=tally.where,
            fix="use annotations whose objects have a box and a segmentation, or take the set from data.sets",
        )
    empty = len(sizes.keys() - {entry["image_id"] for entry in kept})
    if empty and split == "train":
        tally.omitted("images without objects, which are not used for training", number=empty)
    return kept


def _complete(entry: dict[str, Any], tally: _Tally) -> None:
    """Fill in what has one reading: no `iscrowd`, or null, is 0, no `area` is that of the outline."""
    if entry.get("iscrowd") is None:
        entry["iscrowd"] = 0
        tally.repaired("no 'iscrowd', taken as 0")
    elif entry["iscrowd"] not in (0, 1):
        tally.refused("'iscrowd' is neither 0 nor 1", _shown(entry), "set 'iscrowd' to 0 for single objects")
    computed = entry.pop("computed_area", 0.0)
    if entry.get("area") is None:
        entry["area"] = computed
        tally.repaired("no 'area', computed from the outline")
    elif not _is_number(entry["area"]):
        tally.refused(
            "'area' is not a number", _shown(entry), "remove 'area': it is computed from the outline"
        )


def _number(objects: list[dict[str, Any]], tally: _Tally) -> None:
    """Number the objects anew if their ids cannot be used. Nothing else refers to these ids."""
    numbers = [entry.get("id") for entry in objects]
    # The COCO API's evaluation takes id 0 for "not matched", and keeps one object per id.
    if all(type(number) is int and number > 0 for number in numbers) and len(set(numbers)) == len(numbers):
        return
    for number, entry in enumerate(objects, 1):
        entry["id"] = number
    tally.repaired("ids of annotations that are missing, equal or not positive; numbered from 1")


class _Boxes:
    """Examines boxes (x, y, width, height) one by one, and together: corners look like large boxes."""

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally
        self._leaving: list[str] = []
        self._number, self._could_be_corners = 0, True

    def is_usable(self, entry: dict[str, Any], width: int, height: int) -> bool:
        """Whether mmdet trains on the object: box and area of at least a pixel inside the picture."""
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            self._tally.refused(
                "'bbox' is not four finite numbers", _shown(entry), "write boxes as [x, y, width, height]"
            )
            return False
        x, y, box_width, box_height = box
        self._number += 1
        inside = max(0, min(x + box_width, width) - max(x, 0)) * max(
            0, min(y + box_height, height) - max(y, 0)
        )
        # mmdet 3.3, `CocoDataset.parse_data_info`.
        has_area = _is_number(entry["area"]) and entry["area"] > 0
        if not inside or box_width < 1 or box_height < 1 or not has_area:
            kind = "an object below one pixel, without area or outside of its picture, which training skips"
            self._tally.omitted(kind, _shown(entry), "correct bbox and area, unless they are meant so")
            return False
        if min(x, y, width - x - box_width, height - y - box_height) < -_SLACK:
            self._leaving.append(_shown(entry))
        fits = x < box_width <= width + _SLACK and y < box_height <= height + _SLACK
        self._could_be_corners &= fits and min(x, y) >= -_SLACK
        return True

    def refuse_corners(self) -> None:
        """Refuse boxes that are (x0, y0, x1, y1); remark on those that leave their pictures."""
        if not self._leaving:
            return
        if self._could_be_corners and len(self._leaving) >= _CORNERS_SHARE * self._number:
            for example in self._leaving:
                fix = "write boxes as [x, y, width, height], not as corners [x0, y0, x1, y1]"
                self._tally.refused(
                    "a box that leaves its picture, while all boxes fit as corners", example, fix
                )
            return
        for example in self._leaving:
            fix = "boxes are [x, y, width, height] in pixels of the picture"
            self._tally.omitted(
                "a box that leaves its picture by more than 2 pixels, cut in training", example, fix
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and is_finite(value)


def _shown(entry: dict[str, Any]) -> str:
    """An entry as a message names it."""
    keys: tuple[str, ...] = ("id", "image_id", "file_name", "name", "bbox")
    return ", ".join(f"{key} {entry[key]!r}" for key in keys if key in entry)[:100] or "an entry without id"
