"""Images as units of 16 x 16 pixels: cutting, choosing which are seen, what a masked network predicts.

Masked Autoencoders Are Scalable Vision Learners; Kaiming He et al.; arXiv 2111.06377, section 3.

Shapes: B images, N units in row-major order, K kept units, D = 16 * 16 * 3 values of a unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitpipe.contracts.errors import InputError

UNIT_PIXELS = 16
PIXELS_PER_UNIT = UNIT_PIXELS * UNIT_PIXELS * 3


class MaskedPrediction(NamedTuple):
    """What the pre-training network says.

    Attributes:
        pred_BND: predicted pixel values of every unit, in image order, each unit flattened as by `patchify`.
        mask_BN: 1 where a unit was hidden, 0 where it was seen, in image order, float32.
        kept_BK: indices of the units that were seen.
    """

    pred_BND: Tensor  # noqa: N815
    mask_BN: Tensor  # noqa: N815
    kept_BK: Tensor  # noqa: N815


class UnitChoice(NamedTuple):
    """Which units are seen: indices, the permutation back to image order, and the mask (1 = hidden)."""

    kept_BK: Tensor  # noqa: N815
    restore_BN: Tensor  # noqa: N815
    mask_BN: Tensor  # noqa: N815


def units_per_side(image_size: int) -> int:
    """16-pixel units per side of a square image.

    Raises:
        InputError: when `image_size` is not a positive multiple of 16.
    """
    if image_size < UNIT_PIXELS or image_size % UNIT_PIXELS:
        below = max(UNIT_PIXELS, image_size // UNIT_PIXELS * UNIT_PIXELS)
        raise InputError(
            f"An image of {image_size} pixels cannot be cut into units of {UNIT_PIXELS}",
            where="image_size",
            fix=f"use a multiple of {UNIT_PIXELS}, for example {below} or {below + UNIT_PIXELS}",
        )
    return image_size // UNIT_PIXELS


def patchify(images_BCHW: Tensor) -> Tensor:
    """Cut images into units, each flattened by row, column, colour: (B, 3, H, W) -> (B, N, 768)."""
    num_images, colours, height, breadth = images_BCHW.shape
    rows, columns = height // UNIT_PIXELS, breadth // UNIT_PIXELS
    units = images_BCHW.reshape(num_images, colours, rows, UNIT_PIXELS, columns, UNIT_PIXELS)
    return units.permute(0, 2, 4, 3, 5, 1).reshape(num_images, rows * columns, -1)


def choose_units(noise_BN: Tensor, mask_ratio: float) -> UnitChoice:
    """Keep the `int(N * (1 - mask_ratio))` units with the smallest noise, in the order of their noise."""
    num_units = noise_BN.shape[1]
    num_kept = int(num_units * (1 - mask_ratio))
    shuffle_BN = noise_BN.argsort(dim=1, stable=True)
    restore_BN = shuffle_BN.argsort(dim=1)
    mask_BN = (restore_BN >= num_kept).float()
    return UnitChoice(shuffle_BN[:, :num_kept], restore_BN, mask_BN)


def check_mask_ratio(num_units: int, mask_ratio: float) -> None:
    """Refuse a ratio that hides every unit or none.

    Raises:
        InputError: naming the ratio and the number of units.
    """
    if not 0 < int(num_units * (1 - mask_ratio)) < num_units:
        raise InputError(
            f"With {num_units} units and mask_ratio {mask_ratio}, nothing is seen or nothing is hidden",
            where="pretrain.mask_ratio",
            fix="choose another mask_ratio or a larger model.image_size",
        )


def check_input(images_BCHW: Tensor, noise_BN: Tensor, image_size: int) -> None:
    """See that a pre-training network gets images and noise of the size that it is built for.

    Raises:
        InputError: naming both sizes.
    """
    num_units = units_per_side(image_size) ** 2
    if images_BCHW.shape[-2:] != (image_size, image_size) or noise_BN.shape[1] != num_units:
        raise InputError(
            f"The pre-training network is built for {image_size} x {image_size} pixels ({num_units} units), "
            f"but got images of {images_BCHW.shape[-2]} x {images_BCHW.shape[-1]} and noise for "
            f"{noise_BN.shape[1]} units",
            where="pretrain",
            fix="set model.image_size to the size of the images",
        )


def grid_of(images_BCHW: Tensor, network: str) -> tuple[int, int]:
    """Rows and columns of units.

    Raises:
        InputError: when a side is no multiple of 16.
    """
    height, breadth = images_BCHW.shape[-2:]
    if height % UNIT_PIXELS or breadth % UNIT_PIXELS:
        raise InputError(
            f"The network cuts images into units of {UNIT_PIXELS} pixels, but got {height} x {breadth}",
            where=network,
            fix=f"resize or pad the images to multiples of {UNIT_PIXELS}",
        )
    return height // UNIT_PIXELS, breadth // UNIT_PIXELS


def gather_units(x: Tensor, kept_BK: Tensor) -> Tensor:
    """Take units by index, per image: (B, N, ...), (B, K) -> (B, K, ...)."""
    num_images, num_units = x.shape[:2]
    first_B1 = torch.arange(num_images, device=x.device).unsqueeze(1) * num_units
    # One selection of whole rows: its backward is a plain row-wise addition.
    rows = x.flatten(0, 1).index_select(0, (kept_BK + first_B1).flatten())
    return rows.view(num_images, kept_BK.shape[1], *x.shape[2:])
