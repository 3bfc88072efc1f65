"""Supervised classification: mix > logits > soft-target cross entropy.

The fine-tuning of iTPN (arXiv 2211.12735, supplement, table 8), which is that of BEiT and MAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.resolve import Precision
from vitpipe.config.train_sections import ClassifyConfig, TrainConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.data.batches import Batch
from vitpipe.data.mixup import Mixup
from vitpipe.evaluate.accuracy import evaluate_classifier
from vitpipe.methods.classify.config import MixedTargetsConfig
from vitpipe.methods.method import CentreCrops, Judgement, Method
from vitpipe.models.families import Family
from vitpipe.models.network import Classifier
from vitpipe.train.ranks import Ranks


class Classify(Method):
    """Trains a classifier on mixed images.

    Args:
        model: (B, 3, H, W) -> logits (B, K).
        mix: mixup, CutMix and label smoothing. They all give class probabilities as targets, hence the
            soft-target loss; without any of them it is ordinary cross entropy.
        classes: names of the K classes.
        frozen: see `Method`.
    """

    def __init__(
        self, model: nn.Module, mix: Mixup, classes: Sequence[str] = (), frozen: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.model, self.mix, self.classes, self.frozen = model, mix, tuple(classes), frozen

    @classmethod
    def build(
        cls,
        config: MethodConfig,
        family: Family[Any],
        model: ModelConfig,
        *,
        section: TrainConfig,
        classes: Sequence[str],
    ) -> Classify:
        """The family's classifier, with as many classes as the training set.

        Raises:
            RecipeError: when the stage is not one of supervised training.
        """
        return cls(*network_and_mixing(config, family, model, section, classes), classes)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`: soft-target cross entropy, mean over the batch."""
        images, targets = self.mix(batch.images, batch.labels_B, key=batch.key("mix"))
        return {"loss": soft_cross_entropy(self.model(images), targets)}

    def judge(self, batches: CentreCrops, ranks: Ranks, precision: Precision) -> Judgement:
        """`top1`, `top5`, `loss` on the validation images; table `per_class`."""
        accuracy = evaluate_classifier(
            self.model, batches("val"), len(self.classes), ranks=ranks, precision=precision
        )
        return Judgement(accuracy.metrics(), tables={"per_class": accuracy.class_rows(self.classes)})


def network_and_mixing(
    config: MethodConfig,
    family: Family[Any],
    model: ModelConfig,
    section: TrainConfig,
    classes: Sequence[str],
) -> tuple[Classifier, Mixup]:
    """What every method needs that trains a classifier on mixed images; arguments as for `Method.build`.

    Raises:
        RecipeError: when the stage is not one of supervised training.
    """
    assert isinstance(config, MixedTargetsConfig)
    # Drop path is an option of the fine-tuning stages, not of the method.
    if not isinstance(section, ClassifyConfig):
        raise RecipeError(
            f"Method '{config.name}' trains in the stages intermediate and finetune only",
            where="method",
            fix="choose another method for this stage, or train in finetune",
        )
    network = family.classifier(model, num_classes=len(classes), drop_path=section.drop_path)
    return network, Mixup(section.augment, len(classes), config.label_smoothing)


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Mean over the batch of -sum_k target_k log softmax_k, in float32; both (B, K) -> scalar."""
    # float32 under autocast too: bfloat16 has 8 bits, and the sum over 1000 classes of log-probabilities
    # needs more.
    return -(targets_BK * F.log_softmax(logits_BK.float(), dim=-1)).sum(dim=-1).mean()


METHOD = Classify
