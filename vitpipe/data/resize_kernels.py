"""The compiled loops of `resize`. Importing this costs a second: numba, and the code from its cache.

Pillow reduces an image in two passes, across and down, with fixed-point weights of 22 bits, and rounds to
8 bits after each. The same integers are computed here, with the loops laid out so that the compiler can
use vector instructions: 32 rows at a time are turned on their side, so that neighbours in memory are
independent sums.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numba
import numpy as np

from vitpipe.config.cache_folder import cache_folder

if not os.access(Path(__file__).parent, os.W_OK):
    # Compiled code is kept beside this file; in an image that a user may not write to, elsewhere.
    numba.config.CACHE_DIR = str(cache_folder() / "numba")

_PRECISION_BITS = 22
_ROWS = 32

_compiled = numba.njit(cache=True, boundscheck=False, nogil=True)


@_compiled
def weights_of(num_in: int, num_out: int, support: float) -> Any:
    """Which inputs each output takes, with fixed-point weights: first (N,), count (N,), weights (N, K)."""
    scale = num_in / num_out
    stretch = max(scale, 1.0)
    reach = support * stretch
    first = np.zeros(num_out, np.int32)
    count = np.zeros(num_out, np.int32)
    weights = np.zeros((num_out, math.ceil(reach) * 2 + 1), np.int32)
    row = np.zeros(weights.shape[1])
    step = 1.0 / stretch
    for out in range(num_out):
        centre = (out + 0.5) * scale
        low = max(int(centre - reach + 0.5), 0)
        high = min(int(centre + reach + 0.5), num_in)
        total = 0.0
        for tap in range(high - low):
            x = abs((tap + low - centre + 0.5) * step)
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
            share = row[tap] / total * (1 << _PRECISION_BITS)
            weights[out, tap] = int(share - 0.5) if share < 0 else int(share + 0.5)
        first[out] = low
        count[out] = high - low
    return first, count, weights


@_compiled
def across(pixels: Any, first: Any, count: Any, weights: Any) -> Any:
    """The pass along rows: (H, W) to (H, N)."""
    height, width = pixels.shape
    num_out = len(first)
    out = np.empty((height, num_out), np.uint32)
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
            sums[:] = 1 << (_PRECISION_BITS - 1)
            for tap in range(count[x]):
                weight = weights[x, tap]
                column = tile_bytes[first[x] + tap]
                for i in range(4 * _ROWS):
                    sums[i] += np.int32(column[i]) * weight
            for i in range(4 * _ROWS):
                result[i] = min(max(sums[i] >> _PRECISION_BITS, 0), 255)
            for row in range(num_rows):
                out[top + row, x] = result_pixels[row]
    return out


@_compiled
def down(pixels: Any, first: Any, count: Any, weights: Any) -> Any:
    """The pass along columns: (H, W) to (N, W)."""
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
def look_up(pixels: Any, table: Any, out: Any) -> None:
    """Packed pixels (H, W) and a table (3, 256) to floats in `out`, (3, H, W)."""
    height, width = pixels.shape
    for y in range(height):
        for x in range(width):
            pixel = pixels[y, x]
            out[0, y, x] = table[0, pixel & 255]
            out[1, y, x] = table[1, (pixel >> 8) & 255]
            out[2, y, x] = table[2, (pixel >> 16) & 255]


def warm_up() -> None:
    """Load or compile every loop for the arrays that it will get; the processes forked later have them."""
    pixels = np.zeros((3, 3), np.uint32)
    pixels.flags.writeable = False  # as what comes out of an image is
    table = np.zeros((3, 256), np.float32)
    weights = weights_of(3, 2, 1.0)
    for given in (pixels, across(pixels, *weights)):
        for turned in (given, down(given, *weights)):
            look_up(turned, table, np.empty((3, *turned.shape), np.float32))
            look_up(turned[:, ::-1], table, np.empty((3, *turned.shape), np.float32))
