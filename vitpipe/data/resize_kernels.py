"""The compiled loops of `resize`: Pillow's integer arithmetic, laid out for vector instructions.

Pillow (Resample.c) resamples in two passes, horizontal and vertical, with fixed-point weights of 22 bits, and
rounds to 8 bits after each. The same integers are computed here. Importing this module takes a second: numba,
and the compiled code from its cache.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numba
import numpy as np

from vitpipe.config.cache_folder import writable_cache_folder

# numba caches compiled code beside the source file, which in a container image may be read-only. Without any
# writable folder numba would raise: there every process compiles anew, which takes some seconds.
_CACHE = (
    Path(__file__).parent if os.access(Path(__file__).parent, os.W_OK) else writable_cache_folder("numba")
)
if _CACHE is not None and Path(__file__).parent != _CACHE:
    numba.config.CACHE_DIR = str(_CACHE)

# Pillow's PRECISION_BITS: 32 - 8 bits of the pixel - 2 bits for overshoot of the filter and the sign.
_PRECISION_BITS = 22
# Rows per tile: 32 rows of 4 channels are 128 independent sums per output column.
_ROWS = 32

# No bounds checks: `weights_of` clamps every tap to the image.
_compiled = numba.njit(cache=_CACHE is not None, boundscheck=False, nogil=True)


@_compiled
def weights_of(num_in: int, num_out: int, support: float) -> Any:
    """Fixed-point filter weights of one pass, as Pillow's `precompute_coeffs`.

    Args:
        num_in: input pixels along the axis.
        num_out: N, output pixels along the axis.
        support: half width of the filter, 1 (bilinear) or 2 (bicubic).

    Returns:
        First input pixel (N,), number of input pixels (N,), weights (N, K), all int32.
    """
    scale = num_in / num_out
    # Antialiasing: the filter is widened when the image shrinks, and never narrower than one input pixel.
    stretch = max(scale, 1.0)
    reach = support * stretch
    first = np.zeros(num_out, np.int32)
    count = np.zeros(num_out, np.int32)
    weights = np.zeros((num_out, math.ceil(reach) * 2 + 1), np.int32)
    row = np.zeros(weights.shape[1])
    step = 1.0 / stretch
    for out in range(num_out):
        centre = (out + 0.5) * scale
        # Truncation after adding 0.5, as C's cast in Pillow; the same below for negative weights.
        low = max(int(centre - reach + 0.5), 0)
        high = min(int(centre + reach + 0.5), num_in)
        total = 0.0
        for tap in range(high - low):
            x = abs((tap + low - centre + 0.5) * step)
            # Triangle filter; then Keys' cubic with a = -0.5 (torch's and OpenCV's bicubic have -0.75).
            if support == 1.0:
                row[tap] = 1.0 - x if x < 1.0 else 0.0
            elif x < 1.0:
                row[tap] = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                row[tap] = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            else:
                row[tap] = 0.0
            total += row[tap]
        for tap in range(high - low):
            # Normalised over the taps inside the image, so that borders do not get darker.
            share = row[tap] / total * (1 << _PRECISION_BITS)
            weights[out, tap] = int(share - 0.5) if share < 0 else int(share + 0.5)
        first[out] = low
        count[out] = high - low
    return first, count, weights


@_compiled
def resize_width(pixels: Any, first: Any, count: Any, weights: Any) -> Any:
    """The horizontal pass: (H, W) to (H, N)."""
    height, width = pixels.shape
    num_out = len(first)
    out = np.empty((height, num_out), np.uint32)
    # Transposed tiles, so that the compiler can use vector instructions: neighbours in memory belong to
    # different rows and so to independent sums. Along a row they would be taps of the same sum.
    tile = np.empty((width, _ROWS), np.uint32)
    tile_bytes = tile.view(np.uint8)
    sums = np.empty(4 * _ROWS, np.int32)
    result = np.empty(4 * _ROWS, np.uint8)
    result_pixels = result.view(np.uint32)
    for top in range(0, height, _ROWS):
        num_rows = min(_ROWS, height - top)
        for row in range(num_rows):
            for x in range(width):
                tile[x, row] = pixels[top + row, x]
        for x in range(num_out):
            # Half a unit, so that the shift below rounds to nearest.
            sums[:] = 1 << (_PRECISION_BITS - 1)
            for tap in range(count[x]):
                weight = weights[x, tap]
                column = tile_bytes[first[x] + tap]
                for i in range(4 * _ROWS):
                    sums[i] += np.int32(column[i]) * weight
            # Clipped: the bicubic filter overshoots beside edges.
            for i in range(4 * _ROWS):
                result[i] = min(max(sums[i] >> _PRECISION_BITS, 0), 255)
            for row in range(num_rows):
                out[top + row, x] = result_pixels[row]
    return out


@_compiled
def resize_height(pixels: Any, first: Any, count: Any, weights: Any) -> Any:
    """The vertical pass: (H, W) to (N, W)."""
    # No transposition: the bytes of a row are neighbours and belong to independent sums already.
    rows = pixels.view(np.uint8)
    num_bytes = rows.shape[1]
    num_out = len(first)
    out = np.empty((num_out, num_bytes), np.uint8)
    sums = np.empty(num_bytes, np.int32)
    for y in range(num_out):
        sums[:] = 1 << (_PRECISION_BITS - 1)
        for tap in range(count[y]):
            weight = weights[y, tap]
            row = rows[first[y] + tap]
            for i in range(num_bytes):
                sums[i] += np.int32(row[i]) * weight
        for i in range(num_bytes):
            out[y, i] = min(max(sums[i] >> _PRECISION_BITS, 0), 255)
    return out.view(np.uint32)


@_compiled
def apply_table(pixels: Any, table: Any, out: Any) -> None:
    """Write the table's (3, 256) values of packed pixels (H, W) into `out`, (3, H, W) float32."""
    height, width = pixels.shape
    for y in range(height):
        for x in range(width):
            # Red is the lowest byte: RGBX on a little-endian machine.
            pixel = pixels[y, x]
            out[0, y, x] = table[0, pixel & 255]
            out[1, y, x] = table[1, (pixel >> 8) & 255]
            out[2, y, x] = table[2, (pixel >> 16) & 255]


def warm_up() -> None:
    """Load or compile every loop for all array types in use; processes that are forked later inherit them."""
    # numba compiles per array type, and layout and writability belong to it: read-only pixels of an image,
    # the results of each pass, and flipped views of both.
    pixels = np.zeros((3, 3), np.uint32)
    pixels.flags.writeable = False  # like the buffer of `packed`
    table = np.zeros((3, 256), np.float32)
    weights = weights_of(3, 2, 1.0)
    for given in (pixels, resize_width(pixels, *weights)):
        for resampled in (given, resize_height(given, *weights)):
            apply_table(resampled, table, np.empty((3, *resampled.shape), np.float32))
            apply_table(resampled[:, ::-1], table, np.empty((3, *resampled.shape), np.float32))
