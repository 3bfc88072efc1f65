"""EsViT: beside DINO's loss, every region of a student's crop learns from the most similar one of the
teacher's.

Efficient Self-supervised Vision Transformers for Representation Learning; Chunyuan Li et al.; arXiv
2106.09785, section 3.2. The match crosses views, unlike SelfPatch's.

Shapes: B images, V crops, G = 2 global crops, N regions (patches) of a crop, C channels, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.data.batches import Batch
from vitpipe.methods.distillation import across_views, cross_entropy
from vitpipe.methods.esvit.config import EsvitConfig
from vitpipe.methods.self_distillation import NUM_GLOBAL, SelfDistillation, by_size, dino_head
from vitpipe.models.network import Encoder


class Esvit(SelfDistillation):
    """View head on the image's vector, region head on every normed patch; the teacher sees global crops."""

    CONFIG = EsvitConfig
    config: EsvitConfig

    @classmethod
    def build_heads(cls, config: Any, model: Encoder) -> dict[str, nn.Module]:
        """View head (`image`) and region head, of equal size."""
        heads = super().build_heads(config, model)
        heads["region"] = dino_head(config, model.feature_width, config.prototypes)
        return heads

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, `view_loss`, `region_loss` (both without their weights), and the teacher's health."""
        config, groups, num_crops = self.config, by_size(batch.views), len(batch.views)
        temperature, num_images = self.teacher_temperature(batch.moment), len(batch.images)
        with torch.no_grad():
            vectors, regions_T = _features(self.teacher.model, torch.cat(batch.views[:NUM_GLOBAL]))
            views, outputs = self.teacher.heads["image"](vectors), self.teacher.heads["region"](regions_T)
            targets = self.centre("image").targets(views, temperature)
            # (G, B, N, ...): the teacher's regions and what they stand for.
            known = regions_T.unflatten(0, (NUM_GLOBAL, num_images))
            meant = self.centre("region").targets(outputs.flatten(0, 1), temperature)
            meant = meant.unflatten(0, known.shape[:3])
            self.centre("image").add(views)
            self.centre("region").add(outputs.flatten(0, 1))
        found = [_features(self.model, group) for group in groups]
        logits = self.heads["image"](torch.cat([vector for vector, _ in found]))
        view_loss = across_views(
            logits.unflatten(0, (num_crops, -1)),
            targets.unflatten(0, (NUM_GLOBAL, -1)),
            config.student_temperature,
        )
        crops = [crop for _, regions in found for crop in regions.split(num_images)]
        region_loss = self._region_loss(crops, known, meant)
        weight = config.region_weight
        return {
            "loss": (1.0 - weight) * view_loss + weight * region_loss,
            "view_loss": view_loss,
            "region_loss": region_loss,
            **self.health(batch, vectors, targets),
        }

    def _region_loss(self, crops: list[Tensor], known_GBNC: Tensor, meant_GBNK: Tensor) -> Tensor:
        """Every region of a crop against the most similar one of each other global crop, mean over regions.

        Args:
            crops: the student's regions, (B, N, C) each, global crops first.
            known_GBNC: the teacher's.
            meant_GBNK: its distributions for them.
        """
        total = torch.zeros((), device=known_GBNC.device)
        for number, regions_BNC in enumerate(crops):
            with torch.no_grad():
                others = [g for g in range(NUM_GLOBAL) if g != number]
                matched = [_matched(regions_BNC, known_GBNC[g], meant_GBNK[g]) for g in others]
                # Added up before the loss, which is linear in them.
                target_BNK = torch.stack(matched).sum(0)
            logits_BNK = self.heads["region"](regions_BNC)
            rows = cross_entropy(
                logits_BNK.flatten(0, 1), target_BNK.flatten(0, 1), self.config.student_temperature
            )
            total = total + rows.mean()
        return total / (NUM_GLOBAL * (len(crops) - 1))


def _features(model: Encoder, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The images' vectors (B, C), and the patches behind the last norm (B, N, C)."""
    features = model.features(images_BCHW)
    return features.pooled, model.final_norm(features.tokens[-1])


def _matched(regions_BNC: Tensor, known_BMC: Tensor, meant_BMK: Tensor) -> Tensor:
    """What the most similar one of M known regions means, by cosine: (B, N, K)."""
    similarity = F.normalize(regions_BNC.float(), dim=-1) @ F.normalize(known_BMC.float(), dim=-1).mT
    nearest_BN1 = similarity.argmax(dim=-1, keepdim=True)
    return meant_BMK.gather(1, nearest_BN1.expand(-1, -1, meant_BMK.shape[-1]))


METHOD = Esvit
