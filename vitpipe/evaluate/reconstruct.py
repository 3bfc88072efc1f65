"""Pictures of masked images and of what a pre-training network makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.data.image_grid import Section, Tile, write_grid
from vitpipe.models.masking import UNIT_PIXELS, MaskedPrediction, images_of, patchify
from vitpipe.models.pixel_target import Target

_MIN_TILE = 192  # pixels; an image of 224 stays as it is


def painted(
    images_BCHW: Tensor, prediction: MaskedPrediction, target: Target, chosen: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Masked images and their reconstructions.

    Args:
        images_BCHW: normalised as the network's input.
        prediction: what the network makes of them.
        target: what it was to predict.
        chosen: which of the images.

    Returns:
        The images with masked units set to 0 (the mean colour), and the images with masked units replaced by
        predictions, both (B, 3, H, W) normalised as the input.
    """
    hidden_BN1 = prediction.mask_BN[chosen].unsqueeze(-1)
    # A unit's or image's mean and deviation are not predicted: they are taken from the original.
    mean, spread = target.mean[chosen], target.spread[chosen]
    units_BND = patchify(images_BCHW[chosen])
    painted_BND = prediction.pred_BND[chosen].float() * spread + mean
    rows, columns = (side // UNIT_PIXELS for side in images_BCHW.shape[-2:])
    masked = images_of(units_BND * (1 - hidden_BN1), rows, columns)
    whole = images_of(units_BND * (1 - hidden_BN1) + painted_BND * hidden_BN1, rows, columns)
    return masked, whole


def save_columns(
    columns: Mapping[str, Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    path: Path,
    *,
    note: str = "",
) -> None:
    """Write a PNG with one row per image and one column per title.

    Args:
        columns: title -> normalised images (B, 3, H, W). Small ones are enlarged by whole factors, so that
            every pixel can still be seen.
        note: what the picture shows, see `write_grid`.

    Raises:
        StorageError: when the disk is full or cannot be written.
    """
    scale, shift = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
    tiles = []
    for image in (image for row in zip(*columns.values(), strict=True) for image in row):
        # The network paints values outside of [0, 1], which uint8 would wrap around.
        pixels = (image.cpu().float() * scale + shift).clamp(0, 1).mul(255).round().byte()
        factor = max(1, _MIN_TILE // max(pixels.shape[1:]))
        whole = pixels.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
        tiles.append(Tile(whole.permute(1, 2, 0).numpy()))
    write_grid(path, [Section("", tiles, tuple(columns))], columns=len(columns), note=note)
