"""MoBY + SelfPatch: beside the contrast of images, every patch learns from its nearest neighbours.

Patch-level Representation Learning for Self-supervised Vision Transformers; Sukmin Yun et al.; CVPR 2022.
The released code has SelfPatch on DINO only; what the paper leaves open is as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.contrast import Contrast
from vitpipe.methods.distillation import Centre
from vitpipe.methods.moby_selfpatch.config import MobySelfPatchConfig
from vitpipe.methods.patch_loss import (
    PatchRows,
    aggregation_of,
    new_aggregation,
    patch_loss,
    student_patches,
    teacher_patches,
)
from vitpipe.methods.teacher_student import Side
from vitpipe.models.class_attention import ClassAttention
from vitpipe.models.network import Encoder, Features
from vitpipe.models.projection import DinoHead
from vitpipe.train.ranks import Ranks


class MobySelfPatch(Contrast):
    """MoBY's loss plus lambda times the patch loss over both views."""

    CONFIG = MobySelfPatchConfig
    config: MobySelfPatchConfig

    def __init__(self, config: MobySelfPatchConfig, student: Side, teacher: Encoder, **more: Any) -> None:
        super().__init__(config, student, teacher, **more)
        self.patch_centre = Centre(config.patch_prototypes, config.centre_momentum)

    @classmethod
    def build_heads(cls, config: Any, model: Encoder) -> dict[str, nn.Module]:
        """MoBY's heads, the patch head, and the aggregation module of an encoder that has none."""
        heads = super().build_heads(config, model)
        hidden, width = config.patch_hidden, config.patch_width
        heads["patch"] = DinoHead(
            model.feature_width, config.patch_prototypes, hidden=hidden, bottleneck=width
        )
        if aggregation_of(model) is None:
            heads["aggregation"] = new_aggregation(model.feature_width, config.aggregation_heads)
        return heads

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, `image_loss` (MoBY's), `patch_loss` (without its weight), and the rank."""
        config = self.config
        online, target = self.both_features(batch)
        found = self.contrast_losses(online, target)
        with torch.no_grad():
            summaries = teacher_patches(_aggregation(self.teacher), target, config.neighbours)
            outputs = self.teacher.heads["patch"](summaries)
            targets = self.patch_centre.targets(outputs, config.teacher_temperature)
            self.patch_centre.add(outputs)
        logits = self.heads["patch"](student_patches(_aggregation(self.student), online))
        patches = patch_loss([PatchRows(logits, len(batch.views))], [targets], config.student_temperature)
        image_loss = found["loss"]
        return {
            **found,
            "loss": image_loss + config.patch_weight * patches,
            "image_loss": image_loss,
            "patch_loss": patches,
        }

    def vectors_of(self, side: Side, features: Features) -> Tensor:
        """The encoder's own vector, or that of the aggregation module beside it."""
        if self.config.image_vector == "pooled":
            return features.pooled
        vectors: Tensor = _aggregation(side)(features.tokens[-1])
        return vectors

    def after_step(self, moment: Moment, ranks: Ranks) -> None:
        """Move the centre; then as MoBY."""
        self.patch_centre.update(ranks)
        super().after_step(moment, ranks)

    def results(self) -> dict[str, nn.Module]:
        """As MoBY, with the centre beside the heads."""
        found = super().results()
        beside = found["heads"]
        assert isinstance(beside, nn.ModuleDict)
        beside["patch_centre"] = self.patch_centre
        return found


def _aggregation(side: Side) -> ClassAttention:
    found = aggregation_of(side.model) or side.heads["aggregation"]
    assert isinstance(found, ClassAttention)
    return found


METHOD = MobySelfPatch
