"""Masked image modelling on pixels: noise > forward > normalised target > loss, by default on masked units.

iTPN: Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735. Target and
loss are those of MAE (arXiv 2111.06377, section 3).

Shapes: B images, N units in row-major order, D = 16 * 16 * 3 values of a unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.resolve import Precision
from vitpipe.config.train_sections import TrainConfig
from vitpipe.contracts.units import counted
from vitpipe.data.batches import Batch
from vitpipe.evaluate.reconstruct import painted
from vitpipe.evaluate.trivial_predictor import TrivialPredictor
from vitpipe.methods.masked_pixels.config import MaskedPixelsConfig
from vitpipe.methods.method import CentreCrops, ImageColumns, Judgement, Method
from vitpipe.methods.shown_images import ShownImages
from vitpipe.models.draws import uniform
from vitpipe.models.families import Family
from vitpipe.models.network import Pretrainer
from vitpipe.models.pixel_target import Target, normalised_target
from vitpipe.train.precision import autocast
from vitpipe.train.ranks import Ranks

_NUM_SHOWN = 6  # images of the figure, where there are classes each of another one


class MaskedPixels(Method):
    """Trains a masked auto-encoder to predict the normalised pixels of the hidden units."""

    model: Pretrainer

    def __init__(
        self, model: Pretrainer, config: MaskedPixelsConfig = MaskedPixelsConfig(), *, by_class: bool = True
    ) -> None:
        """Args: by_class: choose the images of the figure by their classes."""
        super().__init__()
        self.model, self.config, self.by_class = model, config, by_class

    @classmethod
    def build(
        cls,
        config: MethodConfig,
        family: Family[Any],
        model: ModelConfig,
        *,
        section: TrainConfig,
        classes: Sequence[str],
    ) -> MaskedPixels:
        """The family's pre-training network; the section does not matter, classes only to the figure."""
        assert isinstance(config, MaskedPixelsConfig)
        return cls(family.pretrainer(model, mask_ratio=config.mask_ratio), config, by_class=bool(classes))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`: squared error over the units of the micro-batch that count."""
        return {"loss": self.loss_of(batch.images, self.noise(batch, "mask"))}

    def noise(self, batch: Batch, what: str) -> Tensor:
        """Uniform noise (B, N) in [0, 1) for the masks, a function of image, step and purpose."""
        return uniform(batch.moment.key(what), batch.indices_B, self.model.num_units)

    def loss_of(self, images_BCHW: Tensor, noise_BN: Tensor) -> Tensor:
        """The loss for given noise; the units with the smallest noise stay visible."""
        prediction = self.model(images_BCHW, noise_BN)
        mask_BN = prediction.mask_BN
        counted_BN = mask_BN if self.config.loss_on == "masked" else torch.ones_like(mask_BN)
        return unit_error(prediction.pred_BND, self.target(images_BCHW).units_BND, counted_BN)

    def target(self, images_BCHW: Tensor) -> Target:
        """What is to be predicted, and how to undo its normalisation."""
        return normalised_target(images_BCHW, self.config.target_norm)

    @torch.no_grad()
    def judge(self, batches: CentreCrops, ranks: Ranks, precision: Precision) -> Judgement:
        """`loss` and `trivial_loss` on the masked units of the validation images; figure `reconstructions`.

        Every image has a fixed mask of its own, so that losses of different epochs are comparable. The
        trivial loss is that of the best guess that needs no network, see `TrivialPredictor`. The figure has
        original, visible part and reconstruction of the first image of each class, of a set without classes
        those of its first images.
        """
        was_training = self.training
        self.eval()
        trivial = TrivialPredictor(self._targets(batches, ranks), ranks)
        totals, num_images = [0.0, 0.0], 0
        shown = ShownImages(by_class=self.by_class)
        for batch in batches("val"):
            batch = batch.to(ranks.device)
            images, noise_BN = batch.images, self.noise(batch, "eval mask")
            target = self.target(images)
            with autocast(ranks.device, precision):
                prediction = self.model(images, noise_BN)
            guesses = (prediction.pred_BND, trivial(target.units_BND, prediction.mask_BN))
            # Weighted by images: all have equally many masked units, and the last batch may be smaller.
            for number, guess_BND in enumerate(guesses):
                error = unit_error(guess_BND, target.units_BND, prediction.mask_BN)
                totals[number] += float(error) * len(images)
            for row in shown.wanted(batch.labels_B.tolist()) if ranks.is_main else ():
                one = slice(row, row + 1)
                shown.rows.append([images[one], *painted(images, prediction, target, one)])
            num_images += len(images)
        self.train(was_training)
        *totals, count = ranks.sum_numbers([*totals, float(num_images)])
        loss, trivial_loss = (total / max(count, 1.0) for total in totals)
        figures = {"reconstructions": self._figure(shown.rows, ranks.num_ranks)} if shown.rows else {}
        return Judgement({"loss": loss, "trivial_loss": trivial_loss}, figures=figures)

    def _figure(self, rows: list[list[Tensor]], num_ranks: int) -> ImageColumns:
        titles = ("original", "visible", "reconstruction + visible")
        columns = [torch.cat(column) for column in zip(*rows, strict=True)]
        read = f" that rank 0 of {num_ranks} reads" if num_ranks > 1 else ""
        by = {"unit": "hidden patch", "image": "image"}[self.config.target_norm]
        which = f"The first validation image{read} of each of the first {len(rows)} classes. "
        if not self.by_class:
            which = f"The first {counted(len(rows), 'validation image')}{read}. "
        note = (
            f"{which}"
            "The network sees the patches in the middle and predicts the hidden ones. Right its prediction, "
            "with the visible patches of the original pasted in: only the hidden patches are the network's. "
            f"It predicts normalised pixels: mean and contrast of every {by} are taken from the original."
        )
        return ImageColumns(dict(zip(titles, columns, strict=True)), note)

    def _targets(self, batches: CentreCrops, ranks: Ranks) -> Iterator[Tensor]:
        for batch in batches("val"):
            yield self.target(batch.to(ranks.device).images).units_BND


def unit_error(pred_BND: Tensor, target_BND: Tensor, counted_BN: Tensor) -> Tensor:
    """Mean squared error per unit, then the mean over the counted units of the whole batch.

    Args:
        pred_BND: predicted values.
        target_BND: normalised units.
        counted_BN: 1 where a unit counts, in MAE those that were hidden.
    """
    # All images hide the same number of units, so the mean over micro-batches of equal size is the mean over
    # the whole batch.
    error_BN = (pred_BND.float() - target_BND).square().mean(dim=-1)
    return (error_BN * counted_BN).sum() / counted_BN.sum()


METHOD = MaskedPixels
