"""The annotated videos of a verified DAVIS folder, frame by frame, for networks that cut frames into patches.

Frames are resized as in the released evaluation of DINO and SelfPatch: 8-bit pixels, by OpenCV's bilinear
interpolation, which does not smooth before it reduces. OpenCV is imported where a frame is resized: it comes
with the extra `dense`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.contracts.errors import DatasetError, RunError, reason_of, some
from vitpipe.data.image_pixels import rgb_file
from vitpipe.datasets.davis_palette import davis_palette
from vitpipe.datasets.layouts.davis import listed_sequences

_AGAIN = "unpack DAVIS-2017-trainval-480p.zip again and run the prepare stage again"
_LABEL_MODES = ("P", "L", "1")  # one 8-bit label per pixel
_UNLABELLED = 255


@dataclass(frozen=True)
class Clip:
    """One video: its frames with their annotations, in the order of time.

    Attributes:
        frames: JPEG files.
        annotations: label maps, one for every frame and named like it.
        size: height and width of all of them.
    """

    name: str
    frames: tuple[Path, ...]
    annotations: tuple[Path, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.frames)


def clips_of(root: Path, split: str = "val") -> list[Clip]:
    """The videos that a split lists, in its order; the headers of all their files have been read.

    Args:
        root: in DAVIS's layout, at 480p.

    Raises:
        DatasetError: when there is no video, a file of one is missing or no picture, sizes differ within a
            video, annotations are not label maps, or the first of them shows no object.
    """
    listing = root / f"ImageSets/2017/{split}.txt"
    if not listing.is_file():
        raise DatasetError("The list of videos is missing", where=listing, fix=_AGAIN)
    names = listed_sequences(listing.read_bytes(), listing)
    if not names:
        raise DatasetError("The list names no video", where=listing, fix=_AGAIN)
    return [_clip(root, name) for name in names]


def _clip(root: Path, name: str) -> Clip:
    folder = root / "JPEGImages/480p" / name
    frames = tuple(sorted(folder.glob("*.jpg")))
    if not frames:
        raise DatasetError(f"The video '{name}' has no frames", where=folder, fix=_AGAIN)
    annotations = tuple(root / "Annotations/480p" / name / f"{frame.stem}.png" for frame in frames)
    missing = [path.name for path in annotations if not path.is_file()]
    extra = {path.stem for path in (root / "Annotations/480p" / name).glob("*.png")}
    missing += [f"{stem}.jpg" for stem in sorted(extra - {frame.stem for frame in frames})]
    if missing:
        raise DatasetError(
            f"{len(missing)} files of the video '{name}' are missing: {some(missing)}",
            where=folder,
            fix=_AGAIN,
        )
    width, height = _size_of(frames[0])
    odd = [path for path in islice((*frames, *annotations), 1, None) if _size_of(path) != (width, height)]
    if odd:
        raise DatasetError(
            f"{len(odd)} files of the video '{name}' have another size than its first frame, "
            f"{width}x{height}: {some([f'{path.parent.parent.parent.name}/{path.name}' for path in odd])}",
            where=folder,
            fix="use frames and label maps of one size; " + _AGAIN,
        )
    if not set(np.unique(read_labels(annotations[0]))) - {0, _UNLABELLED}:
        raise DatasetError(
            f"The first annotation of the video '{name}' shows no object to propagate",
            where=annotations[0],
            fix=_AGAIN + ", or take the video out of the list",
        )
    return Clip(name, frames, annotations, (height, width))


def _size_of(path: Path) -> tuple[int, int]:
    """Width and height from the header of a frame, or of a label map, whose form is looked at, too."""
    with _readable(path), Image.open(path) as picture:
        if path.suffix == ".png":
            _require_labels(picture, path)
        return picture.size


def _require_labels(picture: Image.Image, path: Path) -> None:
    if picture.mode not in _LABEL_MODES:
        raise DatasetError(
            f"The annotation is an image of mode {picture.mode}, not a label map: the numbers of its objects "
            "are lost",
            where=path,
            fix="use PNG files with a palette (mode P) or one 8-bit channel; " + _AGAIN,
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:
        what = f"A file of a video cannot be read ({reason_of(error)})"
        raise DatasetError(what, where=path, fix=_AGAIN) from error


def read_labels(path: Path) -> NDArray[np.uint8]:
    """The label map (H, W) of an annotation.

    Raises:
        DatasetError: when it cannot be read or is no label map.
    """
    with _readable(path), Image.open(path) as picture:
        _require_labels(picture, path)
        return np.asarray(picture).astype(np.uint8)


def network_size(height: int, width: int, short_side: int, multiple: int) -> tuple[int, int]:
    """Height and width of a frame for the network: 480 x 854 becomes 480 x 832.

    Args:
        short_side: what the shorter side becomes; of a square the height.
        multiple: pixels that the longer side is reduced to a multiple of.
    """
    low, high = sorted((height, width))
    long_side = short_side * high // (low * multiple) * multiple
    return (long_side, short_side) if height > width else (short_side, long_side)


def read_frame(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A frame as RGB pixels (H, W, 3) of this height and width.

    Raises:
        DatasetError: when it cannot be read.
        RunError: when OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise RunError(
            "Frames are resized by OpenCV, which is not installed",
            where="stage video",
            fix="install the extra 'dense' (`make setup` does)",
        ) from error
    with _readable(path):
        pixels = np.asarray(rgb_file(path))
    # Its type says floats, too; the pixels stay 8-bit.
    resized = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)


def first_labels(labels_HW: NDArray[np.uint8], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The first annotation at the patches (R, C), nearest pixel; label 255 becomes background."""
    known_HW = np.where(labels_HW == _UNLABELLED, 0, labels_HW).astype(np.uint8)
    return resized_labels(known_HW, grid)


def resized_labels(labels_HW: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A label map at another height and width, nearest pixel."""
    picture = Image.fromarray(labels_HW).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(picture)


def indexed_png(labels_HW: NDArray[np.uint8]) -> bytes:
    """A label map as the bytes of a PNG with DAVIS's palette, as its tools read and write them."""
    picture = Image.fromarray(labels_HW)
    picture.putpalette(davis_palette())
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
