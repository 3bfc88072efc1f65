"""Evaluation of masked pre-training: the loss on unseen images, and pictures of reconstructions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.config.resolve import Precision
from vitpipe.contracts.seeds import seed_of
from vitpipe.data.batches import Batch
from vitpipe.data.image_grid import Section, Tile, write_grid
from vitpipe.methods.masked_pixels import MaskedPixels, images_of
from vitpipe.models.masking import UNIT_PIXELS, patchify
from vitpipe.train.precision import autocast
from vitpipe.train.ranks import Ranks


def image_noise(indices_B: Tensor, num_units: int, seed: int) -> Tensor:
    """Uniform noise (B, N) in [0, 1) for the masks of evaluation, a function of seed and image.

    Args:
        indices_B: positions of the images in their set.
        num_units: N, units per image.
    """
    # A generator per image: the same image has the same mask in every evaluation, batch and rank, so that
    # losses of different epochs are comparable.
    rows = [
        torch.rand(num_units, generator=torch.Generator().manual_seed(seed_of("eval mask", seed, index)))
        for index in indices_B.tolist()
    ]
    return torch.stack(rows)


@torch.no_grad()
def masked_loss(
    method: MaskedPixels, batches: Iterable[Batch], *, seed: int, ranks: Ranks, precision: Precision
) -> float:
    """Loss on masked units, mean over the images of all ranks; every image has a fixed mask of its own.

    Args:
        batches: this rank's share of the set; over all ranks every image once.
        seed: of the masks.
        precision: of the forward pass.
    """
    method.eval()
    total, num_images = 0.0, 0
    for batch in batches:
        noise_BN = image_noise(batch.indices_B, method.model.num_units, seed).to(ranks.device)
        with autocast(ranks.device, precision):
            loss = method.loss_of(batch.images_BCHW.to(ranks.device), noise_BN)
        # Weighted by images: all have equally many masked units, and the last batch may be smaller.
        total += float(loss) * len(batch.images_BCHW)
        num_images += len(batch.images_BCHW)
    method.train()
    total, count = ranks.sum_numbers([total, float(num_images)])
    return total / max(count, 1.0)


@torch.no_grad()
def reconstruct(method: MaskedPixels, images_BCHW: Tensor, noise_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Masked images and their reconstructions.

    Returns:
        The images with masked units set to 0 (the mean colour), and the images with masked units replaced by
        predictions, both (B, 3, H, W) normalised as the input.
    """
    method.eval()
    prediction = method.model(images_BCHW, noise_BN)
    method.train()
    units_BND = patchify(images_BCHW)
    mean = units_BND.mean(dim=-1, keepdim=True)
    # The inverse of the loss's target (iTPN, as MAE): unbiased variance, 1e-6 under the root. The network
    # predicts units normalised by their own mean and deviation, which only the original image has.
    spread = (units_BND.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    hidden = prediction.mask_BN.unsqueeze(-1)
    painted_BND = prediction.pred_BND.float() * spread + mean
    rows, columns = (side // UNIT_PIXELS for side in images_BCHW.shape[-2:])
    masked = images_of(units_BND * (1 - hidden), rows, columns)
    whole = images_of(units_BND * (1 - hidden) + painted_BND * hidden, rows, columns)
    return masked, whole


def save_columns(columns: list[Tensor], mean: tuple[float, ...], std: tuple[float, ...], path: Path) -> None:
    """Write a PNG with one row per image and one column per tensor (B, 3, H, W) of normalised images.

    Raises:
        StorageError: when the disk is full or cannot be written.
    """
    scale, shift = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
    tiles = []
    for image in (image for row in zip(*columns, strict=True) for image in row):
        # The network paints values outside of [0, 1], which uint8 would wrap around.
        pixels = (image.cpu().float() * scale + shift).clamp(0, 1).mul(255).round().byte()
        tiles.append(Tile(pixels.permute(1, 2, 0).numpy()))
    write_grid(path, [Section("", tiles)], columns=len(columns))
