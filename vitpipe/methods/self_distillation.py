"""The base of methods in which a student learns from a moving average of itself (DINO and its successors).

    crops > student, teacher > heads > losses of the method > optimiser > teacher's average, centres

Emerging Properties in Self-Supervised Vision Transformers; Mathilde Caron et al.; arXiv 2104.14294.

Shapes: B images, V crops of which G = 2 are global, N patches, C channels, K prototypes. Crops are
crop-major: all images' crop 0, then all images' crop 1.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vitpipe.config.distillation_section import SelfDistillationConfig
from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.resolve import Precision
from vitpipe.config.train_sections import AugmentConfig, OptimConfig, TrainConfig
from vitpipe.data.augment import Transform
from vitpipe.data.batches import Batch
from vitpipe.data.crops import MultiCrop
from vitpipe.data.moment import Moment
from vitpipe.methods.collapse import CollapseWatch, Judge
from vitpipe.methods.distillation import Centre, average_in
from vitpipe.methods.method import CentreCrops, Judgement, Method
from vitpipe.models.families import Family
from vitpipe.models.network import Encoder, Features
from vitpipe.models.projection import DinoHead
from vitpipe.optim.groups import parameter_groups
from vitpipe.optim.schedules import cosine, ramp
from vitpipe.train.ranks import Ranks

NUM_GLOBAL = 2


class Side(nn.Module):
    """Student or teacher: an encoder and the heads behind it."""

    def __init__(self, model: Encoder, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.model, self.heads = model, heads


class SelfDistillation(Method):
    """Student, teacher, heads and centres, and what happens to them around a step.

    Attributes:
        model: the student's encoder.
        heads: the student's, by name; `image` is that of the image's vector.
        teacher: encoder and heads that follow the student's.
        centres: of the teacher's outputs, by the head's name.
        watch: which prototypes the teacher still uses.
        by_class: the figure shows an image of each class; the first ones where there are no classes.
    """

    CONFIG: ClassVar[type[SelfDistillationConfig]]
    model: Encoder
    by_class = False

    def __init__(
        self, config: SelfDistillationConfig, student: Side, teacher: Encoder, global_batch: int
    ) -> None:
        super().__init__()
        self.config, self.model, self.heads = config, student.model, student.heads
        self.teacher = Side(teacher, copy.deepcopy(student.heads)).requires_grad_(False)
        self.centres = nn.ModuleDict(
            {name: Centre(prototypes_of(head), config.centre_momentum) for name, head in self.heads.items()
             if isinstance(head, DinoHead)}
        )  # fmt: skip
        self.watch = CollapseWatch(config.prototypes, NUM_GLOBAL * global_batch)

    @classmethod
    def build(
        cls,
        config: MethodConfig,
        family: Family[Any],
        model: ModelConfig,
        *,
        section: TrainConfig,
        classes: Sequence[str],
    ) -> Self:
        """Student and teacher of the family's encoder, and heads; classes matter for the figure only."""
        assert isinstance(config, cls.CONFIG)
        student = family.encoder(model, drop_path=config.drop_path)
        heads = nn.ModuleDict(cls.build_heads(config, student))
        teacher = family.encoder(model, drop_path=0.0)
        found = cls(config, Side(student, heads), teacher, section.global_batch)
        found.by_class = bool(classes)
        return found

    @classmethod
    def build_heads(cls, config: Any, model: Encoder) -> dict[str, nn.Module]:
        """The method's heads by name; at least `image`."""
        return {"image": dino_head(config, model.feature_width, config.prototypes)}

    def views(self, augment: AugmentConfig, image_size: int) -> Transform:
        """Multi-crop with the method's own sizes."""
        return MultiCrop(self.config.crops)

    def begin(self) -> None:
        """The teacher begins as a copy of the student."""
        self.teacher.model.load_state_dict(self.model.state_dict())
        self.teacher.heads.load_state_dict(self.heads.state_dict())

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

    def groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """All matrices and tables decay, class token and positions among them; vectors do not (DINO)."""
        return parameter_groups(self.named_parameters(), weight_decay=optim.weight_decay)

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
        momentum = cosine(moment.progress, self.config.teacher_momentum, 1.0)
        average_in(self.teacher.model, self.model, momentum)
        average_in(self.teacher.heads, self.heads, momentum)

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

    @property
    def student(self) -> Side:
        """The student's side; made anew, so that its parameters have one name only."""
        return Side(self.model, self.heads)


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
