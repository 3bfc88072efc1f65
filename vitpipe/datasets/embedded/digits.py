"""Handwritten digits: scikit-learn's bundled scans, drawn at any size, rotation and slant.

The scans are the 1,797 8x8 images of `sklearn.datasets.load_digits` (Alpaydin and Kaynak, UCI optical
recognition of handwritten digits). Train and val never share a scan.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitpipe.datasets.bundled import bundled_file

NUM_DIGITS = 10
Split = Literal["train", "val"]
# Of the scans of each digit: about 135 for training, 45 for validation.
_VAL_SHARE = 0.25
# Grey value (0 to 1) from which a smoothed scan counts as ink, chosen so that strokes keep their width.
_INK_LEVEL = 0.42
_BLUR = 0.3  # standard deviation of the smoothing, in pixels of the raw scan
_FINE = 8  # pixels of the smoothed scan per pixel of the raw scan


@dataclass(frozen=True)
class Pose:
    """Pose of a digit: ink height in pixels, rotation in degrees, slant (x per y), factor on the width."""

    height: float
    turn: float = 0.0
    slant: float = 0.0
    width_ratio: float = 1.0


@functools.cache
def scans(split: Split) -> tuple[tuple[NDArray[np.float32], ...], ...]:
    """The smoothed scans of a split by digit; each is a tight (h, w) array of grey values in [0, 1]."""
    # Read from the package's file: importing scikit-learn takes seconds.
    table = np.loadtxt(bundled_file("sklearn", "datasets/data/digits.csv.gz"), delimiter=",")
    images, labels = table[:, :-1], table[:, -1]
    chosen = []
    for digit in range(NUM_DIGITS):
        own = images[labels == digit].reshape(-1, 8, 8) / 16.0  # integers from 0 to 16
        # Seeded by the digit alone: the split of the scans is the same for every seed of the dataset.
        order = np.random.Generator(np.random.PCG64(digit)).permutation(len(own))
        num_val = round(len(own) * _VAL_SHARE)
        part = order[:num_val] if split == "val" else order[num_val:]
        chosen.append(tuple(_smooth(own[k]) for k in sorted(part)))
    return tuple(chosen)


def draw_digit(scan: NDArray[np.float32], pose: Pose) -> NDArray[np.float32]:
    """Coverage of the ink in [0, 1], cropped to the ink: (h, w) float32 with h close to `pose.height`."""
    rows, columns = scan.shape
    scale = pose.height / rows
    turn = math.radians(pose.turn)
    stretch = np.array([[scale * pose.width_ratio, pose.slant * scale], [0.0, scale]])
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    forward = rotation @ stretch
    # Bounding box of the transformed scan, with a margin of one pixel on each side for the soft border.
    half = np.abs(forward) @ np.array([columns / 2, rows / 2])
    width, height = (math.ceil(2 * side) + 2 for side in half)
    # Pillow's AFFINE takes the map from output to input coordinates.
    inverse = np.linalg.inv(forward)
    origin = np.array([columns / 2, rows / 2]) - inverse @ np.array([width / 2, height / 2])
    grey = Image.fromarray(scan).transform(
        (width, height),
        Image.Transform.AFFINE,
        (*inverse[0], origin[0], *inverse[1], origin[1]),
        Image.Resampling.BILINEAR,
    )
    # One output pixel is 1/scale scan pixels: the transition from background to ink is about one pixel wide.
    softness = min(0.5, max(0.12, 0.45 * _FINE / max(rows, columns) / scale))
    cover = np.clip((np.asarray(grey) - _INK_LEVEL) / softness + 0.5, 0.0, 1.0)
    return _crop_to_ink(cover.astype(np.float32), 0.5)


def _smooth(scan: NDArray[np.float64]) -> NDArray[np.float32]:
    """Enlarge a scan smoothly: bicubic, then a narrow Gaussian along both axes."""
    # Padded by two pixels, so that the support of the bicubic filter and the blur stay inside.
    padded = Image.fromarray(np.pad(scan, 2).astype(np.float32))
    side = padded.width * _FINE
    fine = np.asarray(padded.resize((side, side), Image.Resampling.BICUBIC))
    blur = _gaussian(side)
    # The Gaussian is separable: once along the columns, once along the rows.
    return _crop_to_ink((blur @ fine @ blur.T).astype(np.float32), _INK_LEVEL, margin=_FINE)


@functools.cache
def _gaussian(side: int) -> NDArray[np.float64]:
    """The (side, side) matrix of a Gaussian blur; rows sum to 1, at the borders as well."""
    distance = np.arange(side)[:, None] - np.arange(side)[None, :]
    kernel = np.exp(-0.5 * (distance / (_BLUR * _FINE)) ** 2)
    return kernel / kernel.sum(1, keepdims=True)


def _crop_to_ink(grey: NDArray[np.float32], level: float, margin: int = 0) -> NDArray[np.float32]:
    """Crop to the pixels of at least `level`, with a margin where the array allows it."""
    rows, columns = np.flatnonzero((grey >= level).any(1)), np.flatnonzero((grey >= level).any(0))
    if not len(rows):
        return grey
    top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
    return np.ascontiguousarray(grey[top : rows[-1] + 1 + margin, left : columns[-1] + 1 + margin])
