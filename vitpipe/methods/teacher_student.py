"""The base of methods with a student and a teacher that follows it: networks, views, parameter groups.

The teacher is a moving average of the student and never learns by itself.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.train_sections import AugmentConfig, OptimConfig, TrainConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.data.augment import Transform
from vitpipe.data.crops import MultiCrop
from vitpipe.methods.method import Method
from vitpipe.models.families import Family
from vitpipe.models.network import Encoder
from vitpipe.optim.groups import parameter_groups


class Side(nn.Module):
    """Student or teacher: an encoder and the heads behind it."""

    def __init__(self, model: Encoder, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.model, self.heads = model, heads


class TeacherStudent(Method):
    """Student and teacher of one encoder, with heads.

    Attributes:
        model: the student's encoder.
        heads: the student's, by name.
        teacher: an encoder of its own, and copies of the heads except those in `STUDENT_ONLY`.
        by_class: figures show an image of each class; the first ones where there are no classes.
    """

    CONFIG: ClassVar[type[MethodConfig]]
    STUDENT_ONLY: ClassVar[tuple[str, ...]] = ()
    model: Encoder

    def __init__(
        self, config: Any, student: Side, teacher: Encoder, *, global_batch: int, by_class: bool = False
    ) -> None:
        super().__init__()
        self.config, self.model, self.heads = config, student.model, student.heads
        self.global_batch, self.by_class = global_batch, by_class
        kept = {name: copy.deepcopy(h) for name, h in student.heads.items() if name not in self.STUDENT_ONLY}
        self.teacher = Side(teacher, nn.ModuleDict(kept)).requires_grad_(False)

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
        """Student and teacher of the family's encoder, and heads; classes matter for figures only.

        Raises:
            RecipeError: with a layer decay, which none of these methods has.
        """
        assert isinstance(config, cls.CONFIG)
        if section.optim.layer_decay is not None:
            raise RecipeError(
                f"Method '{config.name}' trains all layers at one rate",
                where="optim.layer_decay",
                fix="set it to null",
            )
        options: Any = config
        student = family.encoder(model, drop_path=options.drop_path)
        heads = nn.ModuleDict(cls.build_heads(options, student))
        teacher = family.encoder(model, drop_path=0.0)
        return cls(
            options, Side(student, heads), teacher, global_batch=section.global_batch, by_class=bool(classes)
        )

    @classmethod
    @abstractmethod
    def build_heads(cls, config: Any, model: Encoder) -> dict[str, nn.Module]:
        """The method's heads by name, for an encoder."""

    @property
    def student(self) -> Side:
        """The student's side; made anew, so that its parameters have one name only."""
        return Side(self.model, self.heads)

    def views(self, augment: AugmentConfig, image_size: int) -> Transform:
        """Crops with the method's own sizes and augmentations."""
        return MultiCrop(self.config.crops, augment.mean, augment.std)

    def begin(self) -> None:
        """The teacher begins as a copy of the student."""
        self.teacher.model.load_state_dict(self.model.state_dict())
        for name, head in self.teacher.heads.items():
            head.load_state_dict(self.heads[name].state_dict())

    def move_teacher(self, momentum: float) -> None:
        """Average the student in; running statistics of batch norms are the teacher's own."""
        _average_in(self.teacher.model, self.model, momentum)
        for name, head in self.teacher.heads.items():
            _average_in(head, self.heads[name], momentum)

    def groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """All matrices and tables decay, class token and positions too; vectors do not (DINO, MoBY)."""
        return parameter_groups(self.named_parameters(), weight_decay=optim.weight_decay)


@torch.no_grad()
def _average_in(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """`slow = momentum * slow + (1 - momentum) * fast` for every parameter; buffers stay as they are."""
    old = [p.detach() for p in slow.parameters()]
    new = [p.detach() for p in fast.parameters()]
    torch._foreach_lerp_(old, new, 1.0 - momentum)
