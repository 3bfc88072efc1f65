"""DINO: every crop of the student against the teacher's global crops.

Emerging Properties in Self-Supervised Vision Transformers; Mathilde Caron et al.; arXiv 2104.14294.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitpipe.data.batches import Batch
from vitpipe.methods.dino.config import DinoConfig
from vitpipe.methods.distillation import across_views
from vitpipe.methods.self_distillation import NUM_GLOBAL, SelfDistillation, by_size
from vitpipe.models.network import Encoder


class Dino(SelfDistillation):
    """The image loss of section 3.1; the centre is the mean over both global crops."""

    CONFIG = DinoConfig

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, and the teacher's health."""
        groups, num_crops = by_size(batch.views), len(batch.views)
        with torch.no_grad():
            # Not the first group: local crops may have the size of the global ones.
            global_crops = torch.cat(batch.views[:NUM_GLOBAL])
            vectors, teacher = _logits(self.teacher.model, self.teacher.heads["image"], [global_crops])
            centre = self.centre("image")
            targets = centre.targets(teacher, self.teacher_temperature(batch.moment))
            centre.add(teacher)
        _, student = _logits(self.model, self.heads["image"], groups)
        loss = across_views(
            student.unflatten(0, (num_crops, -1)),
            targets.unflatten(0, (NUM_GLOBAL, -1)),
            self.config.student_temperature,
        )
        return {"loss": loss, **self.health(batch, vectors, targets)}


def _logits(model: Encoder, head: torch.nn.Module, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Vectors (R, C) and logits (R, K) of all crops; the head sees all of them at once."""
    vectors = torch.cat([model.features(group).pooled for group in groups])
    return vectors, head(vectors)


METHOD = Dino
