"""SelfPatch's loss: every patch of the student against a summary of its nearest neighbours by the teacher.

Patch-level Representation Learning for Self-supervised Vision Transformers; Sukmin Yun et al.; CVPR 2022.

Shapes: B images, V crops, N patches of a crop, C channels, K prototypes of the patch head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitpipe.methods.distillation import cross_entropy
from vitpipe.models.class_attention import ClassAttention
from vitpipe.models.neighbours import nearest_neighbours
from vitpipe.models.network import Encoder, Features

# Channels of a head in Swin, whose last stage has 24 of them. Plain vision transformers have a module of
# their own.
_HEAD_CHANNELS = 32


class PatchRows(NamedTuple):
    """Outputs of the patch head for crops of one size.

    Attributes:
        logits_RK: rows of R = v * B * N patches.
        num_crops: v, how many crops per image these are.
    """

    logits_RK: Tensor  # noqa: N815
    num_crops: int


def aggregation_of(model: Encoder) -> ClassAttention | None:
    """The encoder's own aggregation module; `None` where it pools otherwise."""
    found = getattr(model, "aggregation", None)
    return found if isinstance(found, ClassAttention) else None


def new_aggregation(width: int, num_heads: int | None) -> ClassAttention:
    """A module beside an encoder that has none of its own."""
    return ClassAttention(width, num_heads or max(1, width // _HEAD_CHANNELS))


def student_patches(aggregation: ClassAttention, features: Features) -> Tensor:
    """The student's view of each patch: its own token, normed; (B * N, C)."""
    normed: Tensor = aggregation.norm(features.tokens[-1])
    return normed.flatten(0, 1)


def teacher_patches(aggregation: ClassAttention, features: Features, k: int) -> Tensor:
    """The teacher's view of each patch: its k nearest neighbours, aggregated; (B * N, C)."""
    tokens_BNC = features.tokens[-1]
    chosen_BNk = nearest_neighbours(tokens_BNC, features.grids[-1], k)
    return aggregation.around(tokens_BNC, chosen_BNk).flatten(0, 1)


def split_rows(logits_RK: Tensor, num_rows: Sequence[int], num_crops: Sequence[int]) -> list[PatchRows]:
    """Outputs of the head for all sizes at once, by size."""
    return [PatchRows(rows, v) for rows, v in zip(logits_RK.split(list(num_rows)), num_crops, strict=True)]


def patch_loss(student: Sequence[PatchRows], targets: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean over the crops; each weighs the same, although a local one has fewer patches.

    Args:
        student: by size of the crops.
        targets: the teacher's distributions for the same rows.
    """
    total = torch.zeros((), device=targets[0].device)
    for rows, target in zip(student, targets, strict=True):
        total = total + rows.num_crops * cross_entropy(rows.logits_RK, target, temperature).mean()
    return total / sum(rows.num_crops for rows in student)
