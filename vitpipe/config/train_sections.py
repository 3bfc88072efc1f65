"""The sections of stages that train on images with classes: optimiser, augmentation, the run itself."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from vitpipe.config.data import LocalPath
from vitpipe.config.method import METHODS, MethodConfig, SupervisedMethod
from vitpipe.config.model import ModelConfig
from vitpipe.config.named import settings_of
from vitpipe.config.section import (
    Auto,
    Count,
    Effects,
    LearningRate,
    NotNegative,
    Positive,
    Range,
    Ratio,
    RatioRange,
    Section,
)
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD


def _rising(epochs: tuple[float, ...]) -> tuple[float, ...]:
    if list(epochs) != sorted(set(epochs)):
        raise ValueError("the epochs of the drops must rise")
    return epochs


class OptimConfig(Section):
    """The optimiser and its schedule. Peak lr = base_lr, times global_batch / lr_reference_batch where given.

    `lr_factor` replaces that quotient; with `scale_all_rates` it multiplies `warmup_lr` and `min_lr`, too,
    which are absolute otherwise. `clip_grad_norm` is the largest norm of all gradients together, or of every
    tensor's with `clip_each_tensor` (DINO). `betas` and `eps` are AdamW's, `momentum` that of SGD (not
    Nesterov's) and LARS, `trust_coefficient` that of LARS. `layer_decay` multiplies the learning rate once
    per layer from the head towards the input. The warm-up lasts `warmup_epochs`, or `warmup_steps` where
    given. It replaces the beginning of the curve, from `warmup_lr` on; with `warmup_factor` it multiplies the
    curve, from this factor on (mmdetection, mmsegmentation). The curve ends at `min_lr`. With
    `warmup_reaches_peak` the last step of the warm-up has the peak already (DINO), otherwise the step after
    it (MAE). The curve counts from the end of the warm-up (MAE, DINO) or from the start of the `run` (Swin,
    mmdetection); its unit says how often the rate changes. `step` multiplies by `drop_factor` at each of
    `drop_epochs`. With `final_weight_decay` weight decay follows a cosine to it (DINO).
    """

    effects: ClassVar[Effects] = Effects(
        weights=(
            "name base_lr lr_reference_batch lr_factor scale_all_rates min_lr betas eps momentum "
            "trust_coefficient weight_decay final_weight_decay layer_decay clip_grad_norm clip_each_tensor "
            "warmup_epochs warmup_steps warmup_lr warmup_factor warmup_reaches_peak schedule schedule_start "
            "schedule_unit drop_epochs drop_factor poly_power"
        ),
    )

    # LARS and SGD are for linear probes: MAE and its successors train theirs with LARS, DINO and MoCo-v3 with
    # SGD.
    name: Literal["adamw", "lars", "sgd"] = "adamw"
    base_lr: LearningRate
    # The linear scaling rule (Goyal et al., 2017) as MAE states it; None: base_lr is absolute.
    lr_reference_batch: Count | None = 256
    lr_factor: Positive | None = None
    scale_all_rates: bool = False
    min_lr: NotNegative = 0.0
    betas: tuple[Ratio, Ratio] = (0.9, 0.999)
    eps: Positive = 1e-8
    momentum: Ratio = 0.9
    trust_coefficient: Positive = 0.001
    weight_decay: NotNegative = 0.05
    final_weight_decay: NotNegative | None = None
    # None and 1.0 differ: None makes no groups per layer at all, so the plan shows no table of layers.
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    clip_grad_norm: Positive | None = None
    clip_each_tensor: bool = False
    # May be a fraction, and may exceed the epochs: warm-up then lasts for the whole run.
    warmup_epochs: NotNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_lr: NotNegative = 0.0
    warmup_factor: Ratio | None = None
    warmup_reaches_peak: bool = False
    schedule: Literal["cosine", "step", "poly", "constant"] = "cosine"
    schedule_start: Literal["after_warmup", "run"] = "after_warmup"
    schedule_unit: Literal["step", "epoch"] = "step"
    # May be fractions: the drops of ViTDet's schedule are 8/9 and 26/27 of the run.
    drop_epochs: Annotated[tuple[Positive, ...], AfterValidator(_rising)] = ()
    drop_factor: Ratio = 0.1
    poly_power: Positive = 1.0


# The notation of timm's `rand_augment_transform`, without what it ignores silently: magnitude, its standard
# deviation and its upper bound, number of layers, probability, rising severity, set of operations.
_RAND_AUGMENT = re.compile(
    r"rand(?:-(?:m\d+|mstd\d+(?:\.\d+)?|mmax\d+|n\d+|p(?:0?\.\d+|[01](?:\.0+)?)|inc[01]|t(?:weights|3aw|3a)))*"
)


def _rand_augment(text: str) -> str:
    if not _RAND_AUGMENT.fullmatch(text):
        raise ValueError("not a policy in timm's notation; write for example rand-m9-mstd0.5-inc1")
    return text


RandAugment = Annotated[str, AfterValidator(_rand_augment)]


class AugmentConfig(Section):
    """What happens to a training image; the strings are timm's."""

    effects: ClassVar[Effects] = Effects(
        weights=(
            "crop_scale crop_ratio interpolation flip_probability color_jitter rand_augment "
            "erase_probability mixup_alpha cutmix_alpha mix_probability mix_switch_probability mean "
            "std"
        ),
    )

    # Area and aspect ratio of the Inception crop; the defaults of torchvision's RandomResizedCrop.
    crop_scale: RatioRange = (0.08, 1.0)
    crop_ratio: Range = (0.75, 4.0 / 3.0)
    # Only these two: the compiled resampling agrees with Pillow to the last bit for them.
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip_probability: Ratio = 0.5
    color_jitter: NotNegative = 0.0
    # timm's notation, for example rand-m9-mstd0.5-inc1: the papers state theirs in it.
    rand_augment: RandAugment | None = None
    erase_probability: Ratio = 0.0
    mixup_alpha: NotNegative = 0.0
    cutmix_alpha: NotNegative = 0.0
    # Of a batch being mixed at all; then which of the two, when both are on.
    mix_probability: Ratio = 1.0
    mix_switch_probability: Ratio = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


# What is done to images with their labels: only methods that read labels can follow.
MIXING = ("mixup_alpha", "cutmix_alpha", "mix_probability", "mix_switch_probability")
# All but what images are measured by, too. Methods that take several views (`CropsConfig`) make them by their
# own settings.
SINGLE_VIEW = (
    "crop_scale",
    "crop_ratio",
    "flip_probability",
    "color_jitter",
    "rand_augment",
    "erase_probability",
    *MIXING,
)


class LoopConfig(Section, ABC):
    """What every stage has that trains by the loop of `vitpipe.train`."""

    effects: ClassVar[Effects] = Effects(
        weights="dataset global_batch micro_batch optim precision ema_decay weights",
        figures="log_every_steps",
        nothing="checkpoint_minutes",
    )

    # Images per GPU and micro-batch that `auto` does not exceed: the per-GPU batch of the papers' own launch
    # lines, which a 40 GB card holds for the largest network here.
    most_per_gpu: ClassVar[int]
    dataset: str
    # Over all ranks and accumulation steps, so that a recipe does not depend on the number of GPUs.
    global_batch: Count
    micro_batch: Count | Auto = "auto"
    optim: OptimConfig
    precision: Literal["auto", "off", "bf16", "fp16"] = "auto"
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    # At most this much work is repeated after a kill; a state of the largest network takes seconds to write.
    checkpoint_minutes: Positive = 10.0
    log_every_steps: Count = 10
    weights: LocalPath | None = None

    def num_images(self, whole: int) -> int:
        """Images that are trained on, of so many that the training set has."""
        return whole

    @abstractmethod
    def length(self, steps_per_epoch: int) -> tuple[int, str]:
        """Optimiser steps of the whole run, and how they follow.

        Args:
            steps_per_epoch: whole global batches in the training set.
        """


class TrainConfig(LoopConfig):
    """What every stage has that trains on images with classes."""

    effects: ClassVar[Effects] = Effects(
        weights="epochs train_share augment",
    )

    most_per_gpu: ClassVar[int] = 64
    dataset: str = "imagenet"
    # Low-shot figures train on 0.01 or 0.1 of ImageNet's training images, of every class its part.
    train_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    # May be a fraction: the demo trains less than one epoch of some stages.
    epochs: Positive
    augment: AugmentConfig = AugmentConfig()

    def network_misfit(self, model: ModelConfig) -> str:
        """What the method does not read, or cannot do with the network, see `MethodConfig.misfit`."""
        method: MethodConfig | None = getattr(self, "method", None)
        if method is None:
            return ""
        usual = AugmentConfig()
        for key in method.ignored_augment:
            if (value := getattr(self.augment, key)) != getattr(usual, key):
                return f"augment.{key} is {value}, which method '{method.name}' does not read: leave it out"
        why = method.misfit(model, self.global_batch)
        return f"method.{why}" if why else ""

    def num_images(self, whole: int) -> int:
        """`train_share` of them, at least one."""
        return max(1, round(whole * self.train_share))

    def length(self, steps_per_epoch: int) -> tuple[int, str]:
        """`epochs` in steps, see `LoopConfig.length`."""
        return in_epochs(self.epochs, steps_per_epoch)


def in_epochs(epochs: float, steps_per_epoch: int) -> tuple[int, str]:
    """A run's length that is given in epochs, see `LoopConfig.length`."""
    # At least one: the smallest profiles ask for a fraction of an epoch of a handful of images.
    return max(1, round(epochs * steps_per_epoch)), f"{epochs:g} epochs x {steps_per_epoch} steps"


class ClassifyConfig(TrainConfig):
    """Supervised classification: intermediate (IN-22K) and final (IN-1K) fine-tuning."""

    effects: ClassVar[Effects] = Effects(
        weights="method drop_path",
        figures="eval_crop_ratio eval_batch",
        # Curves only: neither weights nor results, so what is finished needs no other ones.
        nothing="validate_epochs register_model",
    )

    method: SupervisedMethod = Field(default_factory=lambda: settings_of(METHODS, "classify"))
    drop_path: Ratio = 0.0
    # Resize the short side to 256, crop 224: the protocol of the published rows.
    eval_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 224 / 256
    eval_batch: Count = 64
    # The validation set is measured this often during training; null for never, when time is measured.
    validate_epochs: Positive | None = 1.0
    # Into MLflow's model registry, where it can be served.
    register_model: bool = False
