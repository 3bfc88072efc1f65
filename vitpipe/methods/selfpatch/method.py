"""DINO + SelfPatch: beside the image's loss, every patch learns from its nearest neighbours.

Patch-level Representation Learning for Self-supervised Vision Transformers; Sukmin Yun et al.; CVPR 2022;
details as in the released code where the paper is silent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitpipe.data.batches import Batch
from vitpipe.methods.distillation import across_views
from vitpipe.methods.patch_loss import (
    aggregation_of,
    new_aggregation,
    patch_loss,
    split_rows,
    student_patches,
    teacher_patches,
)
from vitpipe.methods.self_distillation import NUM_GLOBAL, SelfDistillation, by_size, dino_head
from vitpipe.methods.selfpatch.config import SelfPatchConfig
from vitpipe.methods.teacher_student import Side
from vitpipe.models.class_attention import ClassAttention
from vitpipe.models.network import Encoder


class Outputs(NamedTuple):
    """Outputs of one side for all crops.

    Attributes:
        vectors_RC: of the images, crop-major.
        images_RK: logits of the image head.
        patches_RK: logits of the patch head, by size of the crops, crop-major, then patch by patch.
        num_patches: rows of `patches_RK` of each size.
    """

    vectors_RC: Tensor  # noqa: N815
    images_RK: Tensor  # noqa: N815
    patches_RK: Tensor  # noqa: N815
    num_patches: list[int]


class SelfPatch(SelfDistillation):
    """The image loss of DINO plus lambda times the patch loss, over all crops."""

    CONFIG = SelfPatchConfig
    config: SelfPatchConfig

    @classmethod
    def build_heads(cls, config: Any, model: Encoder) -> dict[str, nn.Module]:
        """Image head, patch head, and the aggregation module of an encoder that has none of its own."""
        width = model.feature_width
        heads = super().build_heads(config, model)
        heads["patch"] = dino_head(config, width, config.patch_prototypes)
        if aggregation_of(model) is None:
            heads["aggregation"] = new_aggregation(width, None)
        return heads

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, `image_loss`, `patch_loss` (without its weight), and the teacher's health."""
        config, groups, num_crops = self.config, by_size(batch.views), len(batch.views)
        temperature, num_images = self.teacher_temperature(batch.moment), len(batch.images)
        with torch.no_grad():
            teacher = self.outputs(self.teacher, groups, is_teacher=True)
            num_global = NUM_GLOBAL * num_images
            targets = self.centre("image").targets(teacher.images_RK[:num_global], temperature)
            patch_targets = self.centre("patch").targets(teacher.patches_RK, temperature)
            # Of all crops: the local ones are computed for their patches anyway. DINO's centre is that of the
            # global ones, which alone are targets.
            self.centre("image").add(teacher.images_RK)
            self.centre("patch").add(teacher.patches_RK)
        student = self.outputs(self.student, groups, is_teacher=False)
        image_loss = across_views(
            student.images_RK.unflatten(0, (num_crops, -1)),
            targets.unflatten(0, (NUM_GLOBAL, -1)),
            config.student_temperature,
        )
        crops_of_sizes = [len(group) // num_images for group in groups]
        rows = split_rows(student.patches_RK, student.num_patches, crops_of_sizes)
        patches = patch_loss(rows, patch_targets.split(student.num_patches), config.student_temperature)
        return {
            "loss": image_loss + config.patch_weight * patches,
            "image_loss": image_loss,
            "patch_loss": patches,
            **self.health(batch, teacher.vectors_RC[:num_global], targets),
        }

    def outputs(self, side: Side, groups: list[Tensor], *, is_teacher: bool) -> Outputs:
        """Both heads on all crops; each head sees the rows of all sizes at once."""
        aggregation = aggregation_of(side.model) or side.heads["aggregation"]
        assert isinstance(aggregation, ClassAttention)
        vectors, patches = [], []
        for group in groups:
            features = side.model.features(group)
            vectors.append(features.pooled)
            if is_teacher:
                patches.append(teacher_patches(aggregation, features, self.config.neighbours))
            else:
                patches.append(student_patches(aggregation, features))
        vectors_RC = torch.cat(vectors)
        return Outputs(
            vectors_RC,
            side.heads["image"](vectors_RC),
            side.heads["patch"](torch.cat(patches)),
            [len(rows) for rows in patches],
        )


METHOD = SelfPatch
