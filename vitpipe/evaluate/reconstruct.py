"""What masked pre-training has learned: its loss on unseen images, and a picture of what it paints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vitpipe.config.resolve import Precision
from vitpipe.contracts.errors import disk_errors
from vitpipe.contracts.seeds import seed_of
from vitpipe.data.batches import Batch
from vitpipe.methods.masked_pixels import MaskedPixels, images_of
from vitpipe.models.masking import UNIT_PIXELS, patchify
from vitpipe.train.precision import autocast
from vitpipe.train.ranks import Ranks

_GAP_PIXELS = 2


def image_noise(indices_B: Tensor, num_units: int, seed: int) -> Tensor:
    """Uniform noise (B, N) as a function of seed and image, so that ranks and batches do not matter."""
    rows = [
        torch.rand(num_units, generator=torch.Generator().manual_seed(seed_of("eval mask", seed, index)))
        for index in indices_B.tolist()
    ]
    return torch.stack(rows)


@torch.no_grad()
def masked_loss(
    method: MaskedPixels, batches: Iterable[Batch], *, seed: int, ranks: Ranks, precision: Precision
) -> float:
    """Loss on masked units, mean over the images of all ranks; every image has its own fixed mask."""
    method.eval()
    total, num_images = 0.0, 0
    for batch in batches:
        noise_BN = image_noise(batch.indices_B, method.model.num_units, seed).to(ranks.device)
        with autocast(ranks.device, precision):
            loss = method.loss_of(batch.images_BCHW.to(ranks.device), noise_BN)
        total += float(loss) * len(batch.images_BCHW)
        num_images += len(batch.images_BCHW)
    method.train()
    total, count = ranks.sum_numbers([total, float(num_images)])
    return total / max(count, 1.0)


@torch.no_grad()
def reconstruct(method: MaskedPixels, images_BCHW: Tensor, noise_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The images as the network sees them (hidden units grey, value 0), and with what it paints there.

    Predictions are in normalised units; each is put back to the mean and spread of the unit it replaces.
    """
    method.eval()
    prediction = method.model(images_BCHW, noise_BN)
    method.train()
    units_BND = patchify(images_BCHW)
    mean = units_BND.mean(dim=-1, keepdim=True)
    spread = (units_BND.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    hidden = prediction.mask_BN.unsqueeze(-1)
    painted_BND = prediction.pred_BND.float() * spread + mean
    rows, columns = (side // UNIT_PIXELS for side in images_BCHW.shape[-2:])
    masked = images_of(units_BND * (1 - hidden), rows, columns)
    whole = images_of(units_BND * (1 - hidden) + painted_BND * hidden, rows, columns)
    return masked, whole


def save_columns(columns: list[Tensor], mean: tuple[float, ...], std: tuple[float, ...], path: Path) -> None:
    """Write a picture: one row per image, one column per tensor (B, 3, H, W) of normalised images.

    Raises:
        StorageError: when the disk refuses.
    """
    scale, shift = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
    rows = []
    for row in zip(*columns, strict=True):
        tiles = [image.cpu().float() * scale + shift for image in row]
        gap = torch.ones(3, tiles[0].shape[1], _GAP_PIXELS)
        spaced = [part for tile in tiles for part in (tile, gap)][:-1]
        line = torch.cat(spaced, dim=2)
        rows += [line, torch.ones(3, _GAP_PIXELS, line.shape[2])]
    picture = torch.cat(rows[:-1], dim=1).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    with disk_errors(path):
        Image.fromarray(picture.numpy()).save(path)
