"""Signs of a collapse in self-distillation: while it trains, and on the validation images afterwards.

A collapsed teacher gives every image the same output: one prototype, or all of them alike (Caron et al.,
arXiv 2104.14294, section 5.3). Three things show it: the entropy of the teacher's distributions, the rank of
its vectors (RankMe: Garrido et al., arXiv 2210.02885), and the prototypes that no image chooses any more.

Shapes: R rows, C channels, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitpipe.config.distillation_section import SelfDistillationConfig
from vitpipe.config.resolve import Precision
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.distillation import cross_entropy
from vitpipe.methods.method import ImageColumns, Judgement
from vitpipe.methods.shown_images import ShownImages
from vitpipe.train.precision import autocast
from vitpipe.train.ranks import Ranks

if TYPE_CHECKING:
    from vitpipe.methods.self_distillation import SelfDistillation

# A prototype is dead that no row has chosen while there were so many rows for every prototype.
_TURNS = 5
_UNIFORM = 0.98  # of log K: above it all prototypes are alike
# Of log K: how much the distributions of two images differ at least, in a teacher that tells images apart.
_TOLD_APART = 0.01
LOW_RANK = 1.5
GRACE_EPOCHS, GRACE_STEPS = 3, 200


def effective_rank(gram: Tensor) -> float:
    """exp(entropy of the singular values' shares) for X^T X or X X^T (RankMe): 1 to the number of rows."""
    values = torch.linalg.eigvalsh(gram.double().cpu()).clamp(min=0.0).sqrt()
    share = values / values.sum().clamp(min=1e-300)
    return math.exp(float(-(share * share.clamp(min=1e-300).log()).sum()))


def gram_of(vectors_RC: Tensor, *, by_channel: bool = False) -> Tensor:
    """X X^T or X^T X, whichever is smaller, or with `by_channel` the latter; both have the same rank."""
    vectors = vectors_RC if vectors_RC.dtype == torch.float64 else vectors_RC.float()
    is_wide = len(vectors) < vectors.shape[1] and not by_channel
    return vectors @ vectors.t() if is_wide else vectors.t() @ vectors


def entropy(distributions_RK: Tensor) -> Tensor:
    """In nats: (R,)."""
    return torch.special.entr(distributions_RK).sum(-1)


class CollapseWatch(nn.Module):
    """Measures the teacher's outputs in every step, and remembers which prototypes it has used.

    Args:
        num_prototypes: K.
        rows_per_step: rows of one step over all ranks.

    Attributes:
        last_used: the last step in which a prototype was some row's first choice, (K,) int64; -1 for never.
    """

    last_used: Tensor

    def __init__(self, num_prototypes: int, rows_per_step: int) -> None:
        super().__init__()
        self.register_buffer("last_used", torch.full((num_prototypes,), -1, dtype=torch.int64))
        self.patience = math.ceil(_TURNS * num_prototypes / rows_per_step)  # steps
        self._was_sound = False
        self._seen_before: set[str] = set()
        self._said: set[str] = set()

    @torch.no_grad()
    def measured(self, vectors_RC: Tensor, targets_RK: Tensor, moment: Moment) -> dict[str, Tensor]:
        """Entropies of one micro-batch in nats, effective rank of its vectors, share of dead prototypes."""
        self.last_used[targets_RK.argmax(dim=-1)] = moment.step
        # Nobody is dead before everybody could have had a turn.
        dead = self.last_used < moment.step - self.patience
        return {
            "teacher_entropy": entropy(targets_RK).mean(),
            "teacher_mean_entropy": entropy(targets_RK.mean(0)),
            "feature_rank": torch.tensor(effective_rank(gram_of(vectors_RC))),
            "dead_prototypes": dead.float().mean() if moment.step > self.patience else torch.zeros(()),
        }

    @torch.no_grad()
    def update(self, ranks: Ranks) -> None:
        """Join what all ranks have used, after a step."""
        self.last_used.copy_(ranks.gather(self.last_used).amax(0))

    def warnings(
        self, means: Mapping[str, float], moment: Moment, config: SelfDistillationConfig
    ) -> list[str]:
        """Sentences about a collapse, each said once.

        Args:
            means: of `measured`, since the last logged point.
        """
        signs = collapse_signs(means, len(self.last_used), config)
        self._was_sound |= not signs
        # Twice in a row: single points come and go while a training finds its way.
        found = {kind: what for kind, what in signs.items() if kind in self._seen_before}
        self._seen_before = set(signs)
        # At first every teacher gives nearly the same for all images: a random network does. What counts is
        # that it stays so, or comes back.
        if not self._was_sound and (moment.epoch < GRACE_EPOCHS or moment.step < GRACE_STEPS):
            return []
        new = [what for kind, what in found.items() if kind not in self._said]
        self._said |= set(found)
        return [f"Collapse at step {moment.step + 1}: {what}." for what in new]


def collapse_signs(
    means: Mapping[str, float], num_prototypes: int, config: SelfDistillationConfig
) -> dict[str, str]:
    """Kind of a collapse -> what is wrong, and the usual causes.

    Args:
        means: `teacher_entropy`, `teacher_mean_entropy` (that of the mean of all distributions), in nats, and
            `feature_rank`; what is missing shows nothing.
    """
    most = math.log(num_prototypes)
    each, together = (means.get(name, math.nan) for name in ("teacher_entropy", "teacher_mean_entropy"))
    sharp = f"teacher_temperature ({config.teacher_temperature:g})"
    found = {}
    if each > _UNIFORM * most:
        found["uniform"] = (
            "the teacher gives all prototypes the same share. Usual causes: "
            f"{sharp} too high, or a learning rate that is too high"
        )
    elif together - each < _TOLD_APART * most:
        found["single"] = (
            "the teacher gives all images the same output. Usual causes: centre_momentum "
            f"({config.centre_momentum:g}) too near to 1, {sharp} too low, teacher_momentum "
            f"({config.teacher_momentum:g}) too low for the batch, prototypes that learn from the start "
            f"(freeze_prototypes_epochs is {config.freeze_prototypes_epochs})"
        )
    if means.get("feature_rank", math.inf) < LOW_RANK:
        found["rank"] = (
            "the vectors of different images have become the same. Usual causes: learning rate or weight "
            "decay too high, or too few images in a batch"
        )
    return found


def warnings_after(found: Iterable[str]) -> list[str]:
    """The sentences about a trained network."""
    return [f"Collapse on the validation images: {what}." for what in found]


class Judge:
    """Measures a method on whole validation images, in evaluation mode; every rank calls `of`.

    Args:
        method: whose teacher and student are measured.
    """

    def __init__(self, method: SelfDistillation) -> None:
        self.method = method

    def of(self, batches: Iterator[Batch], ranks: Ranks, precision: Precision) -> Judgement:
        """The loss between images and their mirror images, the best guess that sees none, and the health.

        `trivial_loss` is that of a student which gives every image the teacher's mean distribution: the
        entropy of that mean. A `loss` above it has learnt nothing about single images.
        """
        method, width = self.method, self.method.model.feature_width
        num_prototypes = method.config.prototypes
        at_end = Moment(0, 2**31, 2**31 + 1, 1)
        temperature = method.teacher_temperature(at_end)
        # loss, entropy, images; then the sum of distributions, the first choices, the Gram matrix.
        totals = torch.zeros(3, dtype=torch.float64)
        mean_K, chosen_K = torch.zeros(2, num_prototypes, dtype=torch.float64)
        gram_CC = torch.zeros(width, width, dtype=torch.float64)
        shown = ShownImages(by_class=method.by_class)
        for batch in batches:
            images = batch.to(ranks.device).images
            pair = torch.cat([images, images.flip(-1)])
            with autocast(ranks.device, precision):
                features, teacher = method.image_logits(method.teacher, pair)
                student = method.image_logits(method.student, pair)[1]
            targets = method.centre("image").targets(teacher, temperature)
            loss = cross_entropy(student.roll(len(images), 0), targets, method.config.student_temperature)
            totals += (
                torch.stack([loss.sum(), entropy(targets).sum(), loss.new_tensor(len(loss))]).double().cpu()
            )
            mean_K += targets.sum(0).double().cpu()
            chosen_K[targets.argmax(-1).cpu()] += 1.0
            gram_CC += gram_of(features.pooled[: len(images)].double().cpu(), by_channel=True)
            chosen = shown.wanted(batch.labels_B.tolist()) if ranks.is_main else []
            if chosen:
                shown.rows += self._rows(images[chosen])
        totals, mean_K, chosen_K, gram_CC = (ranks.sum(t) for t in (totals, mean_K, chosen_K, gram_CC))
        count = max(1.0, float(totals[2]))
        metrics = {
            "loss": float(totals[0]) / count,
            "trivial_loss": float(entropy(mean_K / count)),
            "teacher_entropy": float(totals[1]) / count,
            "feature_rank": effective_rank(gram_CC),
            "used_prototypes": float((chosen_K > 0).double().mean()),
        }
        figures = {"attention": self._figure(shown.rows)} if shown.rows else {}
        means = {**metrics, "teacher_mean_entropy": metrics["trivial_loss"]}
        signs = collapse_signs(means, num_prototypes, method.config)
        tables = {"health": health_rows(metrics, num_prototypes, width)}
        return Judgement(metrics, tables, figures, warnings_after(signs.values()))

    def _rows(self, images: Tensor) -> list[list[Tensor]]:
        """Columns of the figure for some images: the image, and where the teacher's vector of it looks."""
        looks = self.method.teacher.model.image_attention(images)
        if looks is None:
            return []
        looks = looks.unsqueeze(1)
        looks = (looks / looks.amax((2, 3), keepdim=True)).expand(-1, 3, -1, -1)
        # The figure undoes the normalisation of all its columns.
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        shown = functional.interpolate((looks - mean) / std, size=images.shape[2:], mode="nearest")
        return [[image[None], look[None]] for image, look in zip(images.cpu(), shown.cpu(), strict=True)]

    def _figure(self, rows: list[list[Tensor]]) -> ImageColumns:
        titles = ("image", "attention")
        which = "The first validation image of each class" if self.method.by_class else "Validation images"
        columns = [torch.cat(column) for column in zip(*rows, strict=True)]
        note = (
            f"{which}, and how much of each patch the teacher's vector of the image takes: "
            "the mean of the heads, white for the most."
        )
        return ImageColumns(dict(zip(titles, columns, strict=True)), note)


def health_rows(metrics: Mapping[str, float], num_prototypes: int, width: int) -> list[dict[str, Any]]:
    """The table `health`: what was measured, between which ends, and what it would be in a collapse."""
    most = math.log(num_prototypes)
    facts = {
        "loss": (f"0 to {most:.3g}", "not below trivial_loss"),
        "trivial_loss": (f"0 to {most:.3g}", f"0 for a single prototype, {most:.3g} for a uniform teacher"),
        "teacher_entropy": (f"0 to {most:.3g}", "equal to trivial_loss: all images have the same output"),
        "feature_rank": (f"1 to {width}", "near 1: all vectors have the same direction"),
        "used_prototypes": ("0 to 1", f"near {1 / num_prototypes:.2g}: all images choose the same prototype"),
    }
    return [
        {"measure": name, "value": metrics[name], "range": ends, "in a collapse": sign}
        for name, (ends, sign) in facts.items()
    ]
