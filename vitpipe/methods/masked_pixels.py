"""Masked image modelling on pixels: noise > forward > normalised target > loss on masked units.

iTPN: Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735. Target and
loss are those of MAE (arXiv 2111.06377, section 3).

Shapes: B images, N units in row-major order, D = 16 * 16 * 3 values of a unit.
"""

from __future__ import annotations

from torch import Tensor

from vitpipe.data.batches import Batch
from vitpipe.data.masks import mask_noise
from vitpipe.methods.method import Draw, Method
from vitpipe.models.masking import UNIT_PIXELS, patchify
from vitpipe.models.network import Pretrainer


class MaskedPixels(Method):
    """Trains a masked auto-encoder to predict the normalised pixels of the hidden units."""

    model: Pretrainer

    def __init__(self, model: Pretrainer) -> None:
        super().__init__()
        self.model = model

    def losses(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """`loss`: squared error over the masked units of the micro-batch."""
        # Rank 0: see `Classify.losses`. Drawn on the CPU, so that a GPU run has the same masks.
        noise_BN = mask_noise(
            len(batch.images_BCHW),
            self.model.num_units,
            seed=draw.seed,
            step=draw.step,
            micro=draw.chunk,
            rank=0,
        )
        return {"loss": self.loss_of(batch.images_BCHW, noise_BN.to(batch.images_BCHW.device))}

    def loss_of(self, images_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
        """The loss for given noise; the units with the smallest noise stay visible."""
        prediction = self.model(images_BCHW, noise_BN)
        return masked_error(prediction.pred_BND, normalised_units(images_BCHW), prediction.mask_BN)


def images_of(units_BND: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `patchify`: (B, N, D) -> (B, 3, H, W)."""
    num_images = units_BND.shape[0]
    grid = units_BND.reshape(num_images, rows, columns, UNIT_PIXELS, UNIT_PIXELS, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(num_images, -1, rows * UNIT_PIXELS, columns * UNIT_PIXELS)


def normalised_units(images_BCHW: Tensor) -> Tensor:
    """The target (B, N, D): every unit normalised by its own mean and unbiased variance, eps 1e-6."""
    # MAE's per-patch normalisation with its eps; unbiased because torch's `var` is by default.
    units_BND = patchify(images_BCHW)
    # Written out: torch's `var` takes three times as long on a CPU.
    centred_BND = units_BND - units_BND.mean(dim=-1, keepdim=True)
    variance = centred_BND.square().sum(dim=-1, keepdim=True) / (units_BND.shape[-1] - 1)
    return centred_BND / (variance + 1e-6).sqrt()


def masked_error(pred_BND: Tensor, target_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean squared error per unit, then the mean over the masked units (mask 1) of the whole batch.

    Args:
        pred_BND: predicted values.
        target_BND: of `normalised_units`.
        mask_BN: 1 where a unit was hidden.
    """
    # Visible units do not count (MAE). All images hide the same number of units, so the mean over
    # micro-batches of equal size is the mean over the whole batch.
    error_BN = (pred_BND.float() - target_BND).square().mean(dim=-1)
    return (error_BN * mask_BN).sum() / mask_BN.sum()
