"""The base of MoBY: an online network, a momentum target, and a queue of keys for each of two views.

Self-Supervised Learning with Swin Transformers; Zhenda Xie et al.; arXiv 2105.04553, section 3.

Shapes: B images, C channels of a key, Q keys of a queue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.config.contrast_section import ContrastConfig
from vitpipe.config.resolve import Precision
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.collapse import (
    GRACE_EPOCHS,
    GRACE_STEPS,
    LOW_RANK,
    effective_rank,
    gram_of,
    warnings_after,
)
from vitpipe.methods.distillation import in_image_order
from vitpipe.methods.method import CentreCrops, Judgement
from vitpipe.methods.teacher_student import Side, TeacherStudent
from vitpipe.models.network import Encoder, Features
from vitpipe.models.projection import MobyMlp
from vitpipe.optim.schedules import cosine
from vitpipe.train.precision import autocast
from vitpipe.train.ranks import Ranks

_NUM_VIEWS = 2


class Contrast(TeacherStudent):
    """Queries of one view against keys of the other and the queue of that other view.

    The student is what the paper calls the online network, the teacher its target. The predictor is the
    student's alone.

    Attributes:
        queues: keys of length 1, the oldest from `oldest` on: (2, Q, C).
    """

    CONFIG: ClassVar[type[ContrastConfig]]
    STUDENT_ONLY = ("predictor",)
    config: ContrastConfig
    queues: Tensor
    oldest: Tensor

    def __init__(self, config: ContrastConfig, student: Side, teacher: Encoder, **more: Any) -> None:
        super().__init__(config, student, teacher, **more)
        keys = torch.randn(_NUM_VIEWS, config.queue, config.head_width)
        self.register_buffer("queues", F.normalize(keys, dim=-1))
        self.register_buffer("oldest", torch.zeros(1, dtype=torch.int64))
        self._keys: list[Tensor] = []
        self._said = False

    @classmethod
    def build_heads(cls, config: Any, model: Encoder) -> dict[str, nn.Module]:
        """Projector and predictor; every other head has its copy in the target."""
        width, hidden = config.head_width, config.head_hidden
        projector = MobyMlp(model.feature_width, hidden=hidden, out=width)
        return {"projector": projector, "predictor": MobyMlp(width, hidden=hidden, out=width)}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, and the rank of the target's vectors."""
        return self.contrast_losses(*self.both_features(batch))

    def both_features(self, batch: Batch) -> tuple[Features, Features]:
        """Features of both views together, of the online network and of the target."""
        images = torch.cat(batch.views)
        with torch.no_grad():
            target = self.teacher.model.features(images)
        return self.model.features(images), target

    def contrast_losses(self, online: Features, target: Features) -> dict[str, Tensor]:
        """MoBY's loss for features of both views, view by view; remembers the keys for `after_step`."""
        with torch.no_grad():
            vectors = self.vectors_of(self.teacher, target)
            # One view at a time: the batch norms have the statistics of one view, as in the released code.
            keys = [_unit(self.teacher.heads["projector"](view)) for view in vectors.chunk(_NUM_VIEWS)]
            self._keys.append(torch.stack(keys))
        predict, project = self.heads["predictor"], self.heads["projector"]
        views = self.vectors_of(self.student, online).chunk(_NUM_VIEWS)
        queries = [_unit(predict(project(view))) for view in views]
        loss = self.info_nce(queries[0], keys[1], 1) + self.info_nce(queries[1], keys[0], 0)
        rank = effective_rank(gram_of(vectors))
        return {"loss": loss, "feature_rank": torch.tensor(rank)}

    def vectors_of(self, side: Side, features: Features) -> Tensor:
        """The images' vectors, which the projector reads: (2 * B, C)."""
        return features.pooled

    def info_nce(self, queries_BC: Tensor, keys_BC: Tensor, view: int) -> Tensor:
        """Cross entropy of each query's own key among that view's queue, mean over the images."""
        own_B1 = (queries_BC * keys_BC).sum(-1, keepdim=True)
        scores = torch.cat([own_B1, queries_BC @ self.queues[view].t()], dim=1) / self.config.temperature
        return F.cross_entropy(
            scores.float(), torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        )

    def after_step(self, moment: Moment, ranks: Ranks) -> None:
        """Replace the oldest keys by those of all ranks, in the order of the images; move the target."""
        # Micro-batches first, then views: (M, 2, B, C) > (2, M * B, C).
        keys = in_image_order(torch.stack(self._keys), ranks).transpose(0, 1).flatten(1, 2)
        self._keys.clear()
        first, size = int(self.oldest), keys.shape[1]
        self.queues[:, first : first + size] = keys
        self.oldest.fill_((first + size) % self.config.queue)
        # The released code moves the target before the step that uses it; after the step before is the same.
        progress = (moment.step + 1) / moment.num_steps
        self.move_teacher(cosine(progress, self.config.teacher_momentum, 1.0))

    def warnings(self, means: Mapping[str, float], moment: Moment) -> list[str]:
        """See `Trainable.warnings`."""
        is_early = moment.epoch < GRACE_EPOCHS or moment.step < GRACE_STEPS
        if self._said or is_early or means.get("feature_rank", math.inf) >= LOW_RANK:
            return []
        self._said = True
        return [f"Collapse at step {moment.step + 1}: {self._what_collapsed()}."]

    def _what_collapsed(self) -> str:
        return (
            "the vectors of different images have become the same. Usual causes: learning rate or weight "
            f"decay too high, teacher_momentum ({self.config.teacher_momentum:g}) too low, or too few images "
            "in a batch"
        )

    def results(self) -> dict[str, nn.Module]:
        """The online encoder, which the released linear probe takes; beside it all for a later training."""
        beside = nn.ModuleDict({"student": self.heads, "teacher": self.teacher.heads, "queues": Keys(self)})
        return {"weights": self.model, "teacher": self.teacher.model, "heads": beside}

    @torch.no_grad()
    def judge(self, batches: CentreCrops, ranks: Ranks, precision: Precision) -> Judgement:
        """`loss` between images and their mirror images, `trivial_loss` of equal outputs for all, rank."""
        was_training = self.training
        self.eval()
        total = torch.zeros(2, dtype=torch.float64)
        width = self.model.feature_width
        gram_CC = torch.zeros(width, width, dtype=torch.float64)
        for batch in batches("val"):
            images = batch.to(ranks.device).images
            with autocast(ranks.device, precision):
                online = self.model.features(torch.cat([images, images.flip(-1)]))
                target = self.teacher.model.features(torch.cat([images, images.flip(-1)]))
                loss = self.contrast_losses(online, target)["loss"]
            self._keys.clear()
            total += torch.tensor([float(loss) * len(images), len(images)], dtype=torch.float64)
            gram_CC += gram_of(target.pooled[: len(images)].double().cpu(), by_channel=True)
        total, gram_CC = ranks.sum(total), ranks.sum(gram_CC)
        self.train(was_training)
        metrics = {
            "loss": float(total[0]) / max(1.0, float(total[1])),
            # Every key the same: each query's own key has one share among all.
            "trivial_loss": _NUM_VIEWS * math.log(1 + self.config.queue),
            "feature_rank": effective_rank(gram_CC),
        }
        rows = [
            {"measure": "loss", "value": metrics["loss"], "in a collapse": "trivial_loss"},
            {"measure": "feature_rank", "value": metrics["feature_rank"], "in a collapse": "near 1"},
        ]
        signs = [self._what_collapsed()] if metrics["feature_rank"] < LOW_RANK else []
        return Judgement(metrics, {"health": rows}, warnings=warnings_after(signs))


class Keys(nn.Module):
    """The queues of a method, to be saved beside its heads."""

    def __init__(self, method: Contrast) -> None:
        super().__init__()
        self.register_buffer("keys", method.queues)
        self.register_buffer("oldest", method.oldest)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=-1)
