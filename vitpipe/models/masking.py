"""Images as units of 16 x 16 pixels: cutting, masking, and the output of a masked network.

Masked Autoencoders Are Scalable Vision Learners; Kaiming He et al.; arXiv 2111.06377, section 3.

Shapes: B images, N units in row-major order, K kept units, D = 16 * 16 * 3 values of a unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitpipe.contracts.errors import InputError

# Patch size of iTPN's tables 7 and 9 and of MAE; here also the coarsest stride of HiViT.
UNIT_PIXELS = 16
PIXELS_PER_UNIT = UNIT_PIXELS * UNIT_PIXELS * 3


class MaskedPrediction(NamedTuple):
    """Output of a pre-training network.

    Attributes:
        pred_BND: predicted pixel values of every unit, in image order, each unit flattened as by `patchify`.
        mask_BN: 1 where a unit was hidden, 0 where it was visible, in image order, float32.
        kept_BK: indices of the visible units.
    """

    pred_BND: Tensor  # noqa: N815
    mask_BN: Tensor  # noqa: N815
    kept_BK: Tensor  # noqa: N815


class UnitChoice(NamedTuple):
    """Which units are visible.

    Attributes:
        kept_BK: indices of the visible units, in the order of their noise.
        restore_BN: permutation from "visible units, then hidden ones" back to image order.
        mask_BN: 1 where a unit is hidden, 0 where it is visible, in image order, float32.
    """

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
            f"An image size of {image_size} pixels is not a multiple of the unit size of {UNIT_PIXELS}",
            where="image_size",
            fix=f"use a multiple of {UNIT_PIXELS}, for example {below} or {below + UNIT_PIXELS}",
        )
    return image_size // UNIT_PIXELS


def patchify(images_BCHW: Tensor) -> Tensor:
    """Cut images into units, each flattened by row, column, colour: (B, 3, H, W) -> (B, N, 768)."""
    # Colour last inside a unit, as in MAE and iTPN: the decoder's output channels are in this order, and
    # released weights of it too. (A convolution's kernel has colour first.)
    num_images, colours, height, breadth = images_BCHW.shape
    rows, columns = height // UNIT_PIXELS, breadth // UNIT_PIXELS
    units = images_BCHW.reshape(num_images, colours, rows, UNIT_PIXELS, columns, UNIT_PIXELS)
    return units.permute(0, 2, 4, 3, 5, 1).reshape(num_images, rows * columns, -1)


def images_of(units_BND: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `patchify`: (B, N, D) -> (B, 3, H, W)."""
    num_images = units_BND.shape[0]
    grid = units_BND.reshape(num_images, rows, columns, UNIT_PIXELS, UNIT_PIXELS, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(num_images, -1, rows * UNIT_PIXELS, columns * UNIT_PIXELS)


def choose_units(noise_BN: Tensor, mask_ratio: float) -> UnitChoice:
    """Keep the `int(N * (1 - mask_ratio))` units with the smallest noise, in the order of their noise.

    Args:
        noise_BN: uniform noise per unit, (B, N): which units stay visible is a function of it alone.
        mask_ratio: share of the units to hide.
    """
    # Kept in the order of their noise, not of the image, and rounded down, both as in MAE's released code.
    num_units = noise_BN.shape[1]
    num_kept = int(num_units * (1 - mask_ratio))
    # Stable: equal noise values must give the same order on every device.
    shuffle_BN = noise_BN.argsort(dim=1, stable=True)
    restore_BN = shuffle_BN.argsort(dim=1)  # the inverse permutation
    mask_BN = (restore_BN >= num_kept).float()
    return UnitChoice(shuffle_BN[:, :num_kept], restore_BN, mask_BN)


def check_mask_ratio(num_units: int, mask_ratio: float) -> None:
    """Check that a ratio leaves at least one visible and one hidden unit.

    Raises:
        InputError: when it does not; names the ratio and the number of units.
    """
    # The same rounding as in `choose_units`. Without hidden units the loss would divide by 0.
    if not 0 < int(num_units * (1 - mask_ratio)) < num_units:
        raise InputError(
            f"With mask_ratio {mask_ratio}, all or none of the {num_units} units would be hidden",
            where="pretrain.method.mask_ratio",
            fix="choose a mask_ratio nearer to 0.5 or a larger model.image_size",
        )


def check_input(images_BCHW: Tensor, noise_BN: Tensor, image_size: int) -> None:
    """Check that images and noise have the size that a pre-training network is built for.

    Args:
        images_BCHW: (B, 3, H, W).
        noise_BN: (B, N).
        image_size: pixels per side that the network is built for.

    Raises:
        InputError: when they do not; names both sizes.
    """
    # The decoder's position table has a fixed grid; other sizes would fail later with a message about shapes.
    num_units = units_per_side(image_size) ** 2
    if images_BCHW.shape[-2:] != (image_size, image_size) or noise_BN.shape[1] != num_units:
        raise InputError(
            f"The pre-training network is built for {image_size} x {image_size} pixels ({num_units} units), "
            f"but the images have {images_BCHW.shape[-2]} x {images_BCHW.shape[-1]} and the noise is for "
            f"{noise_BN.shape[1]} units",
            where="pretrain",
            fix="set model.image_size to the size of the images",
        )


def grid_of(images_BCHW: Tensor, network: str) -> tuple[int, int]:
    """Rows and columns of units in images (B, 3, H, W).

    Args:
        images_BCHW: not necessarily square.
        network: its name, for the message.

    Raises:
        InputError: when a side is no multiple of 16.
    """
    height, breadth = images_BCHW.shape[-2:]
    if height % UNIT_PIXELS or breadth % UNIT_PIXELS:
        raise InputError(
            f"Images of {height} x {breadth} pixels cannot be divided into units of {UNIT_PIXELS} pixels",
            where=network,
            fix=f"resize or pad the images to multiples of {UNIT_PIXELS}",
        )
    return height // UNIT_PIXELS, breadth // UNIT_PIXELS


def gather_units(x: Tensor, kept_BK: Tensor) -> Tensor:
    """Take units by index, per image: (B, N, ...), (B, K) -> (B, K, ...)."""
    num_images, num_units = x.shape[:2]
    first_B1 = torch.arange(num_images, device=x.device).unsqueeze(1) * num_units
    # One selection of whole rows: its backward is a plain row-wise addition. `torch.gather` would need an
    # index as large as its output.
    rows = x.flatten(0, 1).index_select(0, (kept_BK + first_B1).flatten())
    return rows.view(num_images, kept_BK.shape[1], *x.shape[2:])
