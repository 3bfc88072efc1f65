"""Masked pre-training on the features of a frozen teacher: one crop twice > masks > features > loss.

iTPN: Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735, with CLIP;
supplement, table 9; target and loss as in the released code:

    loss = smooth_l1(main head, target) + smooth_l1(early head, target), means over all units, hidden or not

Shapes: B images, N units in row-major order, D channels of the features.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.resolve import Precision
from vitpipe.config.train_sections import AugmentConfig, TrainConfig
from vitpipe.data.augment import Transform
from vitpipe.data.batches import Batch
from vitpipe.data.block_mask import block_mask
from vitpipe.data.moment import Moment
from vitpipe.data.teacher_view import TeacherView
from vitpipe.methods.masked_features.config import MaskedFeaturesConfig
from vitpipe.methods.masked_features.frozen_teacher import Teacher
from vitpipe.methods.method import CentreCrops, Judgement, Method
from vitpipe.models.families import Family
from vitpipe.models.network import FeaturePredictor
from vitpipe.train.precision import autocast
from vitpipe.train.ranks import Ranks

_RANDOM_TEACHER = (
    "The targets of this pre-training are those of a teacher with random weights, not of CLIP: its loss says "
    "that the chain works, and nothing about the paper"
)


class MaskedFeatures(Method):
    """Trains a network to predict the features that the teacher has of the whole image.

    Args:
        model: the network.
        teacher: of as many patches as the network has units.
        config: masks and teacher.
    """

    model: FeaturePredictor
    # Read from its file, or drawn again from the run's seed: in no saved state, and it never learns.
    frozen = ("teacher",)

    def __init__(self, model: FeaturePredictor, teacher: Teacher, config: MaskedFeaturesConfig) -> None:
        super().__init__()
        self.model, self.teacher, self.config = model, teacher, config
        self._is_random_said = False

    @classmethod
    def build(
        cls,
        config: MethodConfig,
        family: Family[Any],
        model: ModelConfig,
        *,
        section: TrainConfig,
        classes: Sequence[str],
    ) -> MaskedFeatures:
        """The family's feature predictor and a teacher, whose file is read when the training begins."""
        assert isinstance(config, MaskedFeaturesConfig)
        grid_side = model.image_size // model.token_pixels
        teacher = Teacher(config.teacher, grid_side=grid_side, augment=section.augment)
        network = family.feature_predictor(
            model,
            target_width=teacher.width,
            drop_path=config.drop_path,
            aligned=config.lateral_masking == "aligned",
        )
        return cls(network, teacher, config)

    def views(self, augment: AugmentConfig, image_size: int) -> Transform:
        """The same crop for network and teacher, and a mask: `Batch.views` has the three in this order."""
        return TeacherView(
            augment,
            image_size,
            teacher_size=self.teacher.image_size,
            teacher_normalise=self.teacher.normalise,
            grid_side=self.model.grid_side,
            masked_units=self.config.masked_units,
            smallest_block=self.config.smallest_block,
        )

    def begin(self) -> None:
        """Read the teacher's file.

        Raises:
            CheckpointError: as `read_tower`.
        """
        self.teacher.load()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, the sum of `main_loss` and `early_loss` over all units of the micro-batch."""
        images_BCHW, shown_BCHW, mask_BN = batch.views
        target_BND = self.teacher.targets(shown_BCHW)
        found = self.model(images_BCHW, mask_BN)
        main, early = (unit_loss(given, target_BND).mean() for given in found)
        return {"loss": main + early, "main_loss": main.detach(), "early_loss": early.detach()}

    def warnings(self, means: Mapping[str, float], moment: Moment) -> list[str]:
        """Once: that the teacher is a random one."""
        if self._is_random_said or self.config.teacher.file is not None:
            return []
        self._is_random_said = True
        return [_RANDOM_TEACHER]

    @torch.no_grad()
    def judge(self, batches: CentreCrops, ranks: Ranks, precision: Precision) -> Judgement:
        """Losses on the validation images, each with a fixed mask of its own, beside two guesses.

        `loss`: of the main head over all units; `masked_loss`: over the hidden ones only; `early_loss`: of
        the early head. `trivial_loss`: of the mean target at each place, which needs no image;
        `shifted_trivial_loss`: of the same, moved by one vector per image, the mean difference at the units
        that are seen. Table `teacher`: what gave the targets.
        """
        was_training = self.training
        self.eval()
        mean_ND = self._mean_target(batches, ranks)
        names = ("loss", "early_loss", "trivial_loss", "shifted_trivial_loss")
        totals = torch.zeros(len(names) + 3, dtype=torch.float64)
        for batch in batches("val"):
            batch = batch.to(ranks.device)
            target_BND = self.teacher.targets(self.teacher.seen(batch.images))
            mask_BN = self._fixed_masks(batch)
            with autocast(ranks.device, precision):
                found = self.model(batch.images, mask_BN)
            trivial_BND = mean_ND.expand_as(target_BND)
            seen_BN1 = (1 - mask_BN).unsqueeze(-1)
            gap_B1D = ((target_BND - mean_ND) * seen_BN1).sum(1, keepdim=True) / seen_BN1.sum(1, keepdim=True)
            guesses = (found.main_BND, found.early_BND, trivial_BND, trivial_BND + gap_B1D)
            errors = [unit_loss(guess_BND, target_BND) for guess_BND in guesses]
            sums = [error_BN.sum() for error_BN in errors] + [torch.tensor(float(mask_BN.numel()))]
            sums += [(errors[0] * mask_BN).sum(), mask_BN.sum()]
            totals += torch.stack([value.double().cpu() for value in sums])
        self.train(was_training)
        *over_all, units, over_hidden, hidden = ranks.sum_numbers(totals.tolist())
        metrics = {name: total / max(units, 1.0) for name, total in zip(names, over_all, strict=True)}
        metrics["masked_loss"] = over_hidden / max(hidden, 1.0)
        said = [_RANDOM_TEACHER] if self.config.teacher.file is None else []
        return Judgement(metrics, tables={"teacher": self.teacher.about()}, warnings=said)

    def _mean_target(self, batches: CentreCrops, ranks: Ranks) -> Tensor:
        """Mean target at each place over the validation images, (N, D)."""
        # Of this shape from the start: a rank may have no image at all.
        shape = (self.model.grid_side**2, self.teacher.width)
        total, count = torch.zeros(shape, dtype=torch.float64, device=ranks.device), 0
        for batch in batches("val"):
            target_BND = self.teacher.targets(self.teacher.seen(batch.to(ranks.device).images))
            total += target_BND.double().sum(dim=0)
            count += len(target_BND)
        (all_images,) = ranks.sum_numbers([float(count)])
        return (ranks.sum(total) / max(all_images, 1.0)).float()

    def _fixed_masks(self, batch: Batch) -> Tensor:
        """A mask for each image that depends on its position in the set only, (B, N)."""
        config, side, key = self.config, self.model.grid_side, batch.moment.key("eval mask")
        masks = [
            block_mask(side, config.masked_units, config.smallest_block, random.Random(f"{key} {index}"))
            for index in batch.indices_B.tolist()
        ]
        return torch.stack(masks).to(batch.images.device)


def unit_loss(pred_BND: Tensor, target_BND: Tensor) -> Tensor:
    """Smooth L1 (beta 1) of every unit, a mean over its channels: (B, N), in float32."""
    return F.smooth_l1_loss(pred_BND.float(), target_BND, reduction="none").mean(dim=-1)


METHOD = MaskedFeatures
