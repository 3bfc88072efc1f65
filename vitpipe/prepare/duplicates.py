"""Near duplicates between training and validation images, found by perceptual hash.

The hash is the 64-bit one of the discrete cosine transform (Zauner, Implementation and Benchmarking of
Perceptual Image Hash Functions, 2010, section 3.2.1): 32 x 32 grey pixels, 2-D DCT-II, coefficients 1 to 8
of both axes (the mean and all that does not vary along one axis are left out), one bit each: above the
median or not. Images whose hashes differ in a few bits look alike.

The search is exact: of two hashes at most d bits apart, cut into d + 1 bands, one band is equal (the
pigeonhole principle; multi-index hashing, Norouzi et al., CVPR 2012). So only images that share a band
are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE, _NUM_FREQUENCIES = 32, 8
# Whole numbers, so that every sum is exact and the hash is the same on every machine.
_SCALE = 1 << 12
_COMPARED_AT_ONCE = 1 << 21
_KEPT_BEFORE_PRUNING = 1 << 20
_CELL, _GAP, _TEXT = 200, 10, 18
_PAPER, _INK, _FAINT = (250, 250, 250), (30, 30, 30), (110, 110, 110)

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]


@dataclass(frozen=True)
class NearDuplicates:
    """What a search has found.

    Attributes:
        pairs: (num_pairs, 3): position in train, position in val, distance in bits; nearest first.
        num_val_images: validation images with at least one near duplicate.
        num_capped: of these, how many have more than are listed.
        max_pairs: at most so many are listed for each validation image, the nearest.
    """

    pairs: Pairs
    num_val_images: int
    num_capped: int
    max_pairs: int

    def describe(self) -> str:
        """One sentence for people."""
        if not self.num_val_images:
            return "no validation image has a near duplicate among the training images"
        text = (
            f"{self.num_val_images:,} validation images have near duplicates among the training images, "
            f"{len(self.pairs):,} pairs are listed"
        )
        if self.num_capped:
            text += f"; of {self.num_capped:,} images only the nearest {self.max_pairs} are"
        return text


def perceptual_hash(image: Image.Image) -> int:
    """The hash of one picture, 64 bits; hardly changed by another size or another encoding.

    A flat picture has hash 0, whatever its colour.
    """
    return int(perceptual_hashes(grey_thumbnail(image)[None])[0])


def grey_thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """What the hash looks at: the picture as (32, 32) grey pixels."""
    grey = image if image.mode == "L" else image.convert("L")
    return np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def perceptual_hashes(thumbnails: NDArray[np.uint8]) -> Hashes:
    """Hashes of many pictures.

    Args:
        thumbnails: (N, 32, 32) from `grey_thumbnail`.

    Returns:
        (N,): the lowest frequency in both axes is the lowest bit.
    """
    cosines = _cosines()
    spectrum = cosines @ thumbnails.astype(np.float64) @ cosines.T
    flat = spectrum.reshape(len(thumbnails), _NUM_FREQUENCIES**2)
    ordered = np.sort(flat, axis=1)
    middle = _NUM_FREQUENCIES**2 // 2
    # Twice the median, so that no division rounds.
    bits = 2 * flat > (ordered[:, middle - 1] + ordered[:, middle])[:, None]
    packed = np.packbits(bits, axis=1, bitorder="little")
    return packed.view("<u8").reshape(len(thumbnails)).astype(np.uint64)


def near_duplicates(
    train: Hashes, val: Hashes, max_distance: int = 4, *, max_pairs: int = 20
) -> NearDuplicates:
    """All validation images with a training image at most `max_distance` bits away.

    Equal hashes are compared once, however many images have them (flat pictures), and nothing is held
    but the hashes in order and the pairs that are kept.

    Args:
        train: (num_train,) hashes.
        val: (num_val,) hashes.
        max_distance: bits, 0 to 16.
        max_pairs: how many of the nearest training images are kept for each validation image.

    Raises:
        ValueError: when `max_distance` is out of range.
    """
    if not 0 <= max_distance <= 16:
        raise ValueError(f"max_distance is {max_distance}, not 0 to 16")
    train_groups, val_groups = _Groups(train), _Groups(val)
    alike = _alike(train_groups, val_groups, max_distance, max_pairs)
    pairs, num_capped = _images_of(alike, train_groups, val_groups, max_pairs)
    order = np.lexsort((pairs[:, 0], pairs[:, 1], pairs[:, 2]))
    return NearDuplicates(pairs[order], len(np.unique(pairs[:, 1])), num_capped, max_pairs)


def duplicate_rows(
    found: NearDuplicates,
    name: Callable[[str, int], str],
    *,
    train_labels: NDArray[Any],
    val_labels: NDArray[Any],
    classes: Sequence[str],
    max_rows: int = 10_000,
) -> list[dict[str, Any]]:
    """The pairs as rows of a table, nearest first.

    Args:
        name: gives the name of an image from split and position, for example `ShardSet.read(...).key`.
        train_labels: (num_train,) class numbers.
        val_labels: (num_val,) class numbers.
        classes: class keys or names by class number.
        max_rows: a longer table is cut here.
    """
    rows = []
    for train, val, distance in found.pairs[:max_rows].tolist():
        train_label, val_label = int(train_labels[train]), int(val_labels[val])
        rows.append(
            {
                "val_image": name("val", val),
                "train_image": name("train", train),
                "distance": distance,
                "val_class": classes[val_label],
                "train_class": classes[train_label],
                "same_class": "yes" if train_label == val_label else "no",
            }
        )
    return rows


def duplicate_sheet(
    found: NearDuplicates, read: Callable[[str, int], Image.Image], path: Path, *, num_pairs: int = 24
) -> bool:
    """Draw the nearest pairs side by side, validation left, into one PNG.

    Each validation image appears once, with the nearest of its training images.

    Args:
        read: gives a picture from split and position.

    Returns:
        Whether there was anything to draw.
    """
    _, first = np.unique(found.pairs[:, 1], return_index=True)
    chosen = found.pairs[np.sort(first)[:num_pairs]].tolist()
    if not chosen:
        return False
    num_columns = min(4, len(chosen))
    width, height = 2 * _CELL + 2 * _GAP, _CELL + _TEXT + _GAP
    num_rows = -(-len(chosen) // num_columns)
    sheet = Image.new("RGB", (num_columns * width + _GAP, num_rows * height + _GAP), _PAPER)
    for number, (train, val, distance) in enumerate(chosen):
        corner = (_GAP + number % num_columns * width, _GAP + number // num_columns * height)
        bits = f"{distance} bit{'s' if distance != 1 else ''} apart"
        captions = (f"val {val:,}", f"train {train:,}, {bits}")
        _draw_pair(sheet, corner, (read("val", val), read("train", train)), captions)
    sheet.save(path, "PNG")
    return True


class _Groups:
    """Hashes without repetition, and which images have each.

    Attributes:
        values: (num_groups,) distinct hashes in order.
        starts: (num_groups + 1,) where each group's images begin in `positions`.
        positions: (num_images,) image numbers, ascending within a group.
    """

    def __init__(self, hashes: Hashes) -> None:
        self.positions = np.argsort(hashes, kind="stable")
        ordered = hashes[self.positions]
        is_first = np.ones(len(ordered), bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        self.starts = np.append(np.flatnonzero(is_first), len(ordered))
        self.values: Hashes = ordered[is_first]

    def images(self, group: int, at_most: int) -> NDArray[np.int64]:
        """The first images of a group."""
        start, end = self.starts[group], self.starts[group + 1]
        return self.positions[start : min(end, start + at_most)]

    def sizes(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many images each of these groups has."""
        return self.starts[groups + 1] - self.starts[groups]


def _alike(train: _Groups, val: _Groups, max_distance: int, max_pairs: int) -> Pairs:
    """(train group, val group, distance) of all groups near each other, the nearest of each val group.

    One more than `max_pairs` is kept, so that a cut can be noticed.
    """
    kept: list[Pairs] = []
    num_kept = 0
    for pairs in _candidates(train, val, max_distance):
        kept.append(pairs)
        num_kept += len(pairs)
        if num_kept > _KEPT_BEFORE_PRUNING:
            kept = [_nearest(np.concatenate(kept), train, max_pairs + 1)]
            num_kept = len(kept[0])
    return _nearest(np.concatenate([np.empty((0, 3), np.int64), *kept]), train, max_pairs + 1)


def _candidates(train: _Groups, val: _Groups, max_distance: int) -> Iterator[Pairs]:
    """Each pair of near groups once: in the first band in which the two hashes are equal."""
    if not len(train.values) or not len(val.values):
        return
    earlier: list[np.uint64] = []
    for shift, mask in _bands(max_distance + 1):
        train_keys, val_keys = ((groups.values >> shift) & mask for groups in (train, val))
        train_order = np.argsort(train_keys, kind="stable")
        val_order = np.argsort(val_keys, kind="stable")
        train_keys, val_keys = train_keys[train_order], val_keys[val_order]
        wanted, val_starts = np.unique(val_keys, return_index=True)
        val_ends = np.append(val_starts[1:], len(val_keys))
        train_starts = np.searchsorted(train_keys, wanted, "left")
        train_ends = np.searchsorted(train_keys, wanted, "right")
        limits = np.stack((train_starts, train_ends, val_starts, val_ends), axis=1)
        for start, end, left, right in limits.tolist():
            step = max(1, _COMPARED_AT_ONCE // (right - left))
            for begin in range(start, end, step):
                part = train_order[begin : min(begin + step, end)]
                yield _compare(train, val, part, val_order[left:right], max_distance, earlier)
        earlier.append(mask << shift)


def _compare(
    train: _Groups,
    val: _Groups,
    train_part: NDArray[np.int64],
    val_part: NDArray[np.int64],
    max_distance: int,
    earlier: Sequence[np.uint64],
) -> Pairs:
    """Near pairs of two small lists that were not found in an earlier band."""
    different = train.values[train_part][:, None] ^ val.values[val_part][None, :]
    distances = np.bitwise_count(different)
    rows, columns = np.nonzero(distances <= max_distance)
    is_new = np.ones(len(rows), bool)
    for band in earlier:
        is_new &= (different[rows, columns] & band) != 0
    rows, columns = rows[is_new], columns[is_new]
    found = (train_part[rows], val_part[columns], distances[rows, columns].astype(np.int64))
    return np.stack(found, axis=1).astype(np.int64)


def _nearest(pairs: Pairs, train: _Groups, at_most: int) -> Pairs:
    """Of each val group the nearest train groups, by distance, then by their first image."""
    first_image = train.positions[train.starts[pairs[:, 0]]]
    ordered = pairs[np.lexsort((first_image, pairs[:, 2], pairs[:, 1]))]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered[:, 1], ordered[:, 1], "left")
    return ordered[rank < at_most]


def _images_of(alike: Pairs, train: _Groups, val: _Groups, max_pairs: int) -> tuple[Pairs, int]:
    """Pairs of groups as pairs of images; also how many val images have more than `max_pairs`.

    `alike` is sorted by val group.
    """
    found: list[Pairs] = [np.empty((0, 3), np.int64)]
    num_capped = 0
    groups, starts = np.unique(alike[:, 1], return_index=True)
    for group, own in zip(groups.tolist(), np.split(alike, starts[1:]), strict=False):
        images = [train.images(near, max_pairs) for near in own[:, 0].tolist()]
        distances = np.repeat(own[:, 2], [len(part) for part in images])
        together = np.concatenate(images)
        best = np.lexsort((together, distances))[:max_pairs]
        val_images = val.positions[val.starts[group] : val.starts[group + 1]]
        if train.sizes(own[:, 0]).sum() > max_pairs:
            num_capped += len(val_images)
        for image in val_images.tolist():
            val_column = np.full(len(best), image)
            found.append(np.stack((together[best], val_column, distances[best]), axis=1))
    return np.concatenate(found), num_capped


def _bands(num_bands: int) -> list[tuple[np.uint64, np.uint64]]:
    """(shift, mask) of nearly equal cuts of 64 bits."""
    edges = [round(64 * number / num_bands) for number in range(num_bands + 1)]
    return [(np.uint64(low), np.uint64((1 << (high - low)) - 1)) for low, high in itertools.pairwise(edges)]


def _cosines() -> NDArray[np.float64]:
    """Rows 1 to 8 of the DCT-II, whole numbers, (8, 32)."""
    frequency = np.arange(1, _NUM_FREQUENCIES + 1)[:, None]
    angle = np.pi / _SIDE * (np.arange(_SIDE) + 0.5) * frequency
    return np.rint(_SCALE * np.cos(angle))


def _draw_pair(
    sheet: Image.Image,
    corner: tuple[int, int],
    pictures: tuple[Image.Image, Image.Image],
    captions: tuple[str, str],
) -> None:
    from PIL import ImageDraw, ImageFont

    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = corner[0] + place * (_CELL + _GAP // 2), corner[1]
        scale = _CELL / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        fitted = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        sheet.paste(fitted, (x, y))
        draw.text((x, y + size[1] + 2), caption, fill=_FAINT if place == 0 else _INK, font=font)
