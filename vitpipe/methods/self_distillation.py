"""The base of methods in which a student learns from a moving average of itself (DINO and its successors).

    crops > student, teacher > heads > losses of the method > optimiser > teacher's average, centres

Emerging Properties in Self-Supervised Vision Transformers; Mathilde Caron et al.; arXiv 2104.14294.

Shapes: B images, V crops of which G = 2 are global, N patches, C channels, K prototypes. Crops are
crop-major: all images' crop 0, then all images' crop 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitpipe.config.distillation_section import SelfDistillationConfig
from vitpipe.config.resolve import Precision
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.collapse import CollapseWatch, Judge
from vitpipe.methods.distillation import Centre
from vitpipe.methods.method import CentreCrops, Judgement
from vitpipe.methods.teacher_student import Side, TeacherStudent
from vitpipe.models.network import Encoder, Features
from vitpipe.models.projection import DinoHead
from vitpipe.optim.schedules import cosine, ramp
from vitpipe.train.ranks import Ranks

NUM_GLOBAL = 2


class SelfDistillation(TeacherStudent):
    """Heads and centres, and what happens to them around a step.

    Attributes:
        centres: of the teacher's outputs, by the head's name; `image` is that of the image's vector.
        watch: which prototypes the teacher still uses.
    """

    CONFIG: ClassVar[type[SelfDistillationConfig]]
    config: SelfDistillationConfig

    def __init__(self, config: SelfDistillationConfig, student: Side, teacher: Encoder, **more: Any) -> None:
        super().__init__(config, student, teacher, **more)
        self.centres = nn.ModuleDict(
            {
                name: Centre(prototypes_of(head), config.centre_momentum)
                for name, head in self.heads.items()
                if isinstance(head, DinoHead)
            }
        )
        self.watch = CollapseWatch(config.prototypes, NUM_GLOBAL * self.global_batch)

    @classmethod
    def build_heads(cls, config: Any, model: Encoder) -> dict[str, nn.Module]:
        """The method's heads by name; at least `image`."""
        return {"image": dino_head(config, model.feature_width, config.prototypes)}

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one micro-batch, see `Trainable.losses`."""

    def health(self, batch: Batch, vectors_RC: Tensor, targets_RK: Tensor) -> dict[str, Tensor]:
        """How far the teacher is from a collapse, see `CollapseWatch`; counts its prototypes."""
        return self.watch.measured(vectors_RC, targets_RK, batch.moment)

    def warnings(self, means: Mapping[str, float], moment: Moment) -> list[str]:
        """See `Trainable.warnings`."""
        return self.watch.warnings(means, moment, self.config)

    def centre(self, name: str) -> Centre:
        """The centre of a head's outputs."""
        found = self.centres[name]
        assert isinstance(found, Centre)
        return found

    def teacher_temperature(self, moment: Moment) -> float:
        """Of the moment's epoch."""
        config = self.config
        start, end = config.warmup_teacher_temperature, config.teacher_temperature
        return ramp(moment.epoch, config.warmup_teacher_temperature_epochs, start, end)

    def before_update(self, moment: Moment) -> None:
        """Keep the prototypes as they are in the first epochs."""
        # None and not zero: AdamW leaves such a parameter alone, its weight decay included.
        if moment.epoch < self.config.freeze_prototypes_epochs:
            for name, parameter in self.heads.named_parameters():
                if "last_layer." in name:
                    parameter.grad = None

    def after_step(self, moment: Moment, ranks: Ranks) -> None:
        """Move the centres, then the teacher."""
        for name in self.centres:
            self.centre(name).update(ranks)
        self.watch.update(ranks)
        self.move_teacher(cosine(moment.progress, self.config.teacher_momentum, 1.0))

    def results(self) -> dict[str, nn.Module]:
        """The teacher's encoder, which evaluation takes; beside it what a later training can go on from."""
        beside = nn.ModuleDict(
            {"student": self.heads, "teacher": self.teacher.heads, "centres": self.centres}
        )
        return {"weights": self.teacher.model, "student": self.model, "heads": beside}

    @torch.no_grad()
    def judge(self, batches: CentreCrops, ranks: Ranks, precision: Precision) -> Judgement:
        """Loss between an image and its mirror image, and how far from a collapse; see `Judge`."""
        was_training = self.training
        self.eval()
        found = Judge(self).of(batches("val"), ranks, precision)
        self.train(was_training)
        return found

    def image_logits(self, side: Side, images_BCHW: Tensor) -> tuple[Features, Tensor]:
        """Features of an encoder, and its image head's logits (B, K)."""
        features = side.model.features(images_BCHW)
        return features, side.heads["image"](features.pooled)


def dino_head(config: SelfDistillationConfig, width: int, prototypes: int) -> DinoHead:
    """A head with the widths of the options."""
    return DinoHead(
        width,
        prototypes,
        hidden=config.head_hidden,
        bottleneck=config.head_width,
        trains_length=config.scale_prototypes,
        init_gain=config.head_init_gain,
    )


def prototypes_of(head: DinoHead) -> int:
    """K of a head."""
    return len(head.last_layer.weight_v)


def by_size(views: Sequence[Tensor]) -> list[Tensor]:
    """Crops of one size together, (v * B, 3, S, S) each: one pass through the network for all of them."""
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape == view.shape:
            groups[-1].append(view)
        else:
            groups.append([view])
    return [torch.cat(group) for group in groups]
