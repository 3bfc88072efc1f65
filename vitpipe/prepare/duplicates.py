"""Find near duplicates between training and validation images by perceptual hash.

The hash is the 64-bit DCT hash (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions,
2010, section 3.2.1): 32 x 32 grey pixels, 2-D DCT-II, coefficients 1 to 8 of both axes, one bit each: above
the median or not. Images whose hashes differ in a few bits look alike.

The search is exact multi-index hashing (Norouzi et al., CVPR 2012): if two hashes differ in at most d bits
and are cut into d + 1 bands, at least one band is equal. So only images that share a band are compared.
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

from vitpipe.contracts.units import counted
from vitpipe.data.image_grid import Section, Tile, fit, side_by_side, write_grid

_SIDE, _NUM_FREQUENCIES = 32, 8
# Cosines times 2^12, rounded to integers: sums are exact in float64, and hashes are equal on every machine.
_SCALE = 1 << 12
# Bounds of memory: pairs compared at once (8 bytes each), and pairs collected before the nearest are
# selected.
_COMPARED_AT_ONCE = 1 << 21
_KEPT_BEFORE_PRUNING = 1 << 20
# Three pairs are about 1,000 pixels, which a page shows without shrinking their captions.
_TILE, _PAIR_COLUMNS = 160, 3

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.int64]


@dataclass(frozen=True)
class NearDuplicates:
    """Result of a search.

    Attributes:
        pairs: (num_pairs, 3): position in train, position in val, distance in bits; ascending by distance.
        num_val_images: validation images with at least one near duplicate.
        num_capped: how many of these have more near duplicates than are listed.
        max_pairs: number of pairs listed at most for each validation image, the nearest ones.
    """

    pairs: Pairs
    num_val_images: int
    num_capped: int
    max_pairs: int

    def describe(self) -> str:
        """Summary in one sentence."""
        if not self.num_val_images:
            return "no validation image has a near duplicate among the training images"
        text = (
            f"{counted(self.num_val_images, 'validation image has', 'validation images have')} near "
            f"duplicates among the training images, "
            f"{counted(len(self.pairs), 'pair is', 'pairs are')} listed"
        )
        if self.num_capped:
            text += f"; of {counted(self.num_capped, 'image')} only the nearest {self.max_pairs} are"
        return text


def perceptual_hash(image: Image.Image) -> int:
    """Compute the 64-bit hash of one image; resizing and re-encoding change it by a few bits at most.

    An image of one colour has hash 0, whatever the colour.
    """
    return int(perceptual_hashes(grey_thumbnail(image)[None])[0])


def grey_thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Reduce an image to the (32, 32) grey pixels from which its hash is computed."""
    # A grey image needs no conversion, which would copy it.
    grey = image if image.mode == "L" else image.convert("L")
    return np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def perceptual_hashes(thumbnails: NDArray[np.uint8]) -> Hashes:
    """Compute the hashes of many images.

    Args:
        thumbnails: (N, 32, 32) from `grey_thumbnail`.

    Returns:
        (N,) uint64; the lowest bit is the lowest frequency of both axes.
    """
    cosines = _cosines()
    spectrum = cosines @ thumbnails.astype(np.float64) @ cosines.T
    flat = spectrum.reshape(len(thumbnails), _NUM_FREQUENCIES**2)
    ordered = np.sort(flat, axis=1)
    middle = _NUM_FREQUENCIES**2 // 2
    # The median of 64 values is the mean of the middle two: both sides are doubled, so that no division
    # rounds.
    bits = 2 * flat > (ordered[:, middle - 1] + ordered[:, middle])[:, None]
    # Little-endian in bits and bytes, whatever the machine: hashes are written to disk and compared later.
    packed = np.packbits(bits, axis=1, bitorder="little")
    return packed.view("<u8").reshape(len(thumbnails)).astype(np.uint64)


def near_duplicates(
    train: Hashes, val: Hashes, max_distance: int = 4, *, max_pairs: int = 20
) -> NearDuplicates:
    """Find all validation images with a training image at most `max_distance` bits away.

    Memory: the sorted hashes and the pairs that are kept.

    Args:
        train: (num_train,) hashes.
        val: (num_val,) hashes.
        max_distance: bits, 0 to 16.
        max_pairs: number of nearest training images kept for each validation image.

    Raises:
        ValueError: when `max_distance` is out of range.
    """
    if not 0 <= max_distance <= 16:
        raise ValueError(f"max_distance is {max_distance}, not 0 to 16")
    # By distinct hash: a set may have thousands of images of one colour, all with hash 0, and the pairs of
    # their product would not fit in memory.
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
    """Convert pairs to rows of a table, ascending by distance.

    Args:
        name: returns the name of an image, given split and position, for example `ShardSet.read(...).key`.
        train_labels: (num_train,) class numbers.
        val_labels: (num_val,) class numbers.
        classes: class keys or names by class number.
        max_rows: a longer table is truncated to this length.
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
    """Draw the nearest pairs side by side, validation image left, into one PNG.

    Each validation image appears once, with the nearest of its training images.

    Args:
        read: returns an image, given split and position.

    Returns:
        False when there are no pairs and nothing was written.

    Raises:
        StorageError: when the disk is full or cannot be written.
    """
    _, first = np.unique(found.pairs[:, 1], return_index=True)
    chosen = found.pairs[np.sort(first)[:num_pairs]].tolist()
    if not chosen:
        return False
    tiles = []
    for train, val, distance in chosen:
        # One tile per pair, so that both images stay together whatever the number of columns.
        pair = [
            fit(np.asarray(read(*place).convert("RGB")), _TILE) for place in (("val", val), ("train", train))
        ]
        bits = f"{counted(distance, 'bit')} apart"
        tiles.append(Tile(side_by_side(pair), f"val {val:,} and train {train:,}, {bits}"))
    note = "The nearest pairs: the validation image left, the training image most like it right."
    write_grid(path, [Section("", tiles)], columns=_PAIR_COLUMNS, note=note)
    return True


class _Groups:
    """Distinct hashes, and the images that have each of them.

    Attributes:
        values: (num_groups,) distinct hashes, ascending.
        starts: (num_groups + 1,) index in `positions` at which the images of each group begin.
        positions: (num_images,) image numbers, ascending within a group.
    """

    def __init__(self, hashes: Hashes) -> None:
        # A stable sort keeps images of equal hashes in order, so that `images` returns the first ones.
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
        """Number of images of each of these groups."""
        return self.starts[groups + 1] - self.starts[groups]


def _alike(train: _Groups, val: _Groups, max_distance: int, max_pairs: int) -> Pairs:
    """(train group, val group, distance) of near groups, for each val group the nearest ones."""
    # One more than `max_pairs` is kept, so that `_images_of` can tell whether there are more.
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
    """Yield each pair of near groups once: in the first band in which the two hashes are equal."""
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
            # One band value may be shared by most hashes: the comparison is cut into blocks of bounded size.
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
    """Near pairs of two short lists that no earlier band has yielded."""
    different = train.values[train_part][:, None] ^ val.values[val_part][None, :]
    distances = np.bitwise_count(different)
    rows, columns = np.nonzero(distances <= max_distance)
    # A pair that is equal in an earlier band was yielded there.
    is_new = np.ones(len(rows), bool)
    for band in earlier:
        is_new &= (different[rows, columns] & band) != 0
    rows, columns = rows[is_new], columns[is_new]
    found = (train_part[rows], val_part[columns], distances[rows, columns].astype(np.int64))
    return np.stack(found, axis=1).astype(np.int64)


def _nearest(pairs: Pairs, train: _Groups, at_most: int) -> Pairs:
    """The nearest train groups of each val group, by distance, then by their first image."""
    # Ties by the first image make the result independent of block sizes and of the order of bands.
    first_image = train.positions[train.starts[pairs[:, 0]]]
    ordered = pairs[np.lexsort((first_image, pairs[:, 2], pairs[:, 1]))]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered[:, 1], ordered[:, 1], "left")
    return ordered[rank < at_most]


def _images_of(alike: Pairs, train: _Groups, val: _Groups, max_pairs: int) -> tuple[Pairs, int]:
    """Convert pairs of groups to pairs of images; also count val images with more than `max_pairs`.

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
    """(shift, mask) of bands that divide 64 bits as equally as possible."""
    edges = [round(64 * number / num_bands) for number in range(num_bands + 1)]
    return [(np.uint64(low), np.uint64((1 << (high - low)) - 1)) for low, high in itertools.pairwise(edges)]


def _cosines() -> NDArray[np.float64]:
    """Rows 1 to 8 of the DCT-II matrix, scaled to integers, (8, 32)."""
    # Row 0 is left out: it is the mean, and with it all coefficients that do not vary along one of the axes.
    frequency = np.arange(1, _NUM_FREQUENCIES + 1)[:, None]
    angle = np.pi / _SIDE * (np.arange(_SIDE) + 0.5) * frequency
    return np.rint(_SCALE * np.cos(angle))
