"""A small self-supervised method in the manner of DINO (arXiv 2104.14294): every hook of the interface."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vitpipe.methods.two_views.config import TwoViewsConfig

from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.resolve import Precision
from vitpipe.config.train_sections import AugmentConfig, TrainConfig
from vitpipe.data.augment import Transform
from vitpipe.data.batches import Batch
from vitpipe.data.crops import MultiCrop
from vitpipe.data.moment import Moment
from vitpipe.methods.method import CentreCrops, Judgement, Method
from vitpipe.models.families import Family
from vitpipe.models.network import Classifier
from vitpipe.optim.schedules import cosine, ramp
from vitpipe.train.ranks import Ranks

_OUTPUTS = 16


class TwoViews(Method):
    """Student and head predict the teacher's centred output for the other global view."""

    frozen = ("pixels",)

    def __init__(self, model: Classifier, config: TwoViewsConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.head = nn.Sequential(nn.Linear(_OUTPUTS, 32), nn.GELU(), nn.Linear(32, 8, bias=False))
        self.teacher = copy.deepcopy(nn.ModuleList([self.model, self.head])).requires_grad_(False)
        # A teacher that never changes, in the place of CLIP.
        self.pixels = nn.Conv2d(3, 8, 8, stride=8).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(8))
        self.outputs: list[Tensor] = []

    @classmethod
    def build(
        cls,
        config: MethodConfig,
        family: Family[Any],
        model: ModelConfig,
        *,
        section: TrainConfig,
        classes: Sequence[str],
    ) -> TwoViews:
        """A classifier of the family as an encoder with 16 outputs."""
        assert isinstance(config, TwoViewsConfig)
        return cls(family.classifier(model, num_classes=_OUTPUTS, drop_path=0.3), config)

    def views(self, augment: AugmentConfig, image_size: int) -> Transform:
        """Multi-crop."""
        return MultiCrop(self.config.crops)

    def begin(self) -> None:
        """The teacher starts as the student does."""
        self.teacher[0].load_state_dict(self.model.state_dict())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`: cross entropy across views, and towards the fixed teacher's view of the local crop."""
        first, second, *local = batch.views
        assert [len(view) for view in local] == [len(first)] * self.config.crops.num_local
        both = torch.cat([first, second])
        with torch.no_grad():
            raw = self.teacher[1](self.teacher[0](both))
            self.outputs.append(raw)
            temperature = ramp(batch.moment.epoch, 2, 0.1, 0.2)
            target = F.softmax((raw - self.centre) / temperature, dim=-1).roll(len(first), 0)
            fixed = F.softmax(self.pixels(local[0]).mean(dim=(2, 3)), dim=-1)
        # One call with the views one after the other: each view drops branches of its own.
        log_p = F.log_softmax(self.head(self.model(both)), dim=-1)
        across = -(target * log_p).sum(dim=-1).mean()
        return {"loss": across - (fixed * log_p[: len(first)]).sum(dim=-1).mean(), "across": across.detach()}

    def before_update(self, moment: Moment) -> None:
        """Clip every tensor by itself; the head's last layer stands still in the first epoch."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_(parameter, self.config.clip_each)
        if moment.epoch < self.config.frozen_epochs:
            self.head[-1].weight.grad = None

    @torch.no_grad()
    def after_step(self, moment: Moment, ranks: Ranks) -> None:
        """The teacher follows the student, the centre the teacher's outputs over all ranks."""
        momentum = cosine(moment.progress, self.config.base_momentum, 1.0)
        for part, student in zip(self.teacher, (self.model, self.head), strict=True):
            for slow, fast in zip(part.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - momentum)
        rows = torch.cat(self.outputs)
        mean = ranks.sum(rows.sum(dim=0)) / (len(rows) * ranks.num_ranks)
        self.centre.mul_(0.9).add_(mean, alpha=0.1)
        self.outputs = []

    def results(self) -> dict[str, nn.Module]:
        """The teacher's encoder is the result; student and head beside it."""
        return {"weights": self.teacher[0], "student": self.model, "heads": self.head}

    @torch.no_grad()
    def judge(self, batches: CentreCrops, ranks: Ranks, precision: Precision) -> Judgement:
        """`spread`: mean variance over images of the teacher's outputs; a collapsed teacher has 0."""
        self.eval()
        outputs = [self.teacher[0](batch.images.to(ranks.device)) for batch in batches("val")]
        rows = torch.cat(outputs).double()
        num, total, squares = (
            ranks.sum(torch.tensor(len(rows))),
            *map(ranks.sum, (rows.sum(0), (rows**2).sum(0))),
        )
        spread = float((squares / num - (total / num) ** 2).mean())
        return Judgement({"spread": spread}, {"shape": [{"images": int(num), "outputs": rows.shape[1]}]})


METHOD = TwoViews
