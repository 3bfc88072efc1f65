"""The typed recipe: everything that one reproduction does, frozen once read.

A recipe is one YAML file under `vitpipe/recipes/`. Values that are `"auto"` here are derived in
`resolve.py`, each with its reason. Unknown keys are refused by `read.py` with "did you mean".
Sizes in pixels, learning rates per `lr_reference_batch` images, ratios in [0, 1].
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from vitpipe.config.data import DataConfig, LocalPath
from vitpipe.config.section import Auto, Count, NotNegative, Pixels, Positive, Range, Ratio, Section
from vitpipe.contracts.address import hidden

StageName = Literal[
    "prepare",
    "pretrain",
    "intermediate",
    "finetune",
    "probe",
    "detect",
    "segment",
    "evaluate",
    "report",
]
_ORDER = get_args(StageName)
# Stages whose weights later stages may start from, in running order.
_FEEDERS = ("pretrain", "intermediate", "finetune")
# The channel statistics that all five papers normalise with, as timm and torchvision state them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SourceConfig(Section):
    """Where the recipe's values come from; `url` is shown and never opened."""

    paper: str
    title: str
    url: Annotated[str, AfterValidator(hidden)] = ""
    tables: dict[str, str] = {}


class Expectation(Section):
    """A published row that this recipe claims to reproduce.

    `stage` and `metric` name our number, `where` selects exactly one row of `papers/<paper>.yaml` by
    equality on its keys. `tolerance` is in the row's unit; `scale` turns our number into that unit.
    """

    stage: StageName
    metric: str
    where: dict[str, str | float | int]
    tolerance: Positive
    # Our ratios lie in [0, 1], published accuracies are percentages.
    scale: Positive = 100.0
    protocol: dict[str, str] = {}


class PyramidConfig(Section):
    """The feature pyramid that iTPN trains together with its backbone."""

    # Pixel pre-training as released; table 13's parameter counts fit depth 2 (CLIP pre-training takes 1).
    width: Count = 256
    depth: Count = 2


class DecoderConfig(Section):
    """The pixel decoder of iTPN's pre-training."""

    # MAE's decoder, which iTPN keeps.
    width: Count = 512
    depth: Count = 8
    heads: Count = 16


class ColumnsConfig(Section):
    """The reversible columns of RevCol and RevColV2; a number that is not given is the network's own.

    `memory_mode` says what is kept for the backward pass: everything (`plain`), the inputs of each column
    (`column`), or the last column's outputs only (`reversible`); `auto` is reversible in float32 and
    column under autocast, where inverting is not accurate. `reversible_autocast` allows it there too.
    """

    # None: the number of columns that the network of this name was published with.
    bottom_up: Count | None = None
    top_down: Count | None = None
    memory_mode: Literal["auto", "plain", "column", "reversible"] = "auto"
    reversible_autocast: bool = False


class ModelConfig(Section):
    """Which network. `name` is a key of the model registry, for example `hivit_base`.

    `pyramid` and `decoder` are iTPN's, `columns` RevCol's and RevColV2's; another family's part is refused.
    """

    name: str
    image_size: Pixels = 224
    pyramid: PyramidConfig | None = None
    decoder: DecoderConfig | None = None
    columns: ColumnsConfig | None = None


class AdamWConfig(Section):
    """What every training stage says of its optimiser.

    `layer_decay` multiplies the learning rate once per layer from the head towards the input.
    """

    base_lr: Positive
    betas: tuple[Ratio, Ratio] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.05
    # None and 1.0 differ: None makes no groups per layer at all, so the plan shows no table of layers.
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    clip_grad_norm: Positive | None = None


class OptimConfig(AdamWConfig):
    """The optimiser and its schedule. Peak lr = base_lr, times global_batch / lr_reference_batch where given.

    `betas` and `eps` are AdamW's, `momentum` and `trust_coefficient` those of LARS.
    """

    # LARS is for linear probes only: MAE and its successors train theirs with it.
    name: Literal["adamw", "lars"] = "adamw"
    # The linear scaling rule (Goyal et al., 2017) as MAE states it; None: base_lr is absolute.
    lr_reference_batch: Count | None = 256
    min_lr: NotNegative = 0.0
    momentum: Ratio = 0.9
    trust_coefficient: Positive = 0.001
    # May be a fraction, and may exceed the epochs: warm-up then lasts for the whole run.
    warmup_epochs: NotNegative = 0.0


class AugmentConfig(Section):
    """What happens to a training image; the strings are timm's."""

    # Area and aspect ratio of the Inception crop; the defaults of torchvision's RandomResizedCrop.
    crop_scale: tuple[Ratio, Ratio] = (0.08, 1.0)
    crop_ratio: Range = (0.75, 4.0 / 3.0)
    # Only these two: the compiled resampling agrees with Pillow to the last bit for them.
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip_probability: Ratio = 0.5
    color_jitter: NotNegative = 0.0
    # timm's notation, for example rand-m9-mstd0.5-inc1: the papers state theirs in it.
    rand_augment: str | None = None
    erase_probability: Ratio = 0.0
    mixup_alpha: NotNegative = 0.0
    cutmix_alpha: NotNegative = 0.0
    # Of a batch being mixed at all; then which of the two, when both are on.
    mix_probability: Ratio = 1.0
    mix_switch_probability: Ratio = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class CropsConfig(Section):
    """Several views of an image (multi-crop): two global ones and `num_local` smaller ones.

    Jitter is brightness, contrast, saturation, hue; blur is the radius of Pillow's Gaussian filter. The
    defaults are SelfPatch's; DINO's public baseline takes global areas of 0.4 to 1, local ones to 0.4.
    """

    global_size: Pixels = 224
    local_size: Pixels = 96
    num_local: Annotated[int, Field(ge=0)] = 8
    global_scale: tuple[Ratio, Ratio] = (0.25, 1.0)
    local_scale: tuple[Ratio, Ratio] = (0.05, 0.25)
    crop_ratio: Range = (0.75, 4.0 / 3.0)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip_probability: Ratio = 0.5
    jitter: tuple[NotNegative, NotNegative, NotNegative, NotNegative] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: Ratio = 0.8
    grey_probability: Ratio = 0.2
    blur_radius: Range = (0.1, 2.0)
    blur_probability: tuple[Ratio, Ratio, Ratio] = (1.0, 0.1, 0.5)
    solarise_probability: tuple[Ratio, Ratio, Ratio] = (0.0, 0.2, 0.0)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class TrainConfig(Section):
    """What every training stage has."""

    # May be a fraction: the demo trains less than one epoch of some stages.
    epochs: Positive
    # Over all ranks and accumulation steps, so that a recipe does not depend on the number of GPUs.
    global_batch: Count
    micro_batch: Count | Auto = "auto"
    optim: OptimConfig
    augment: AugmentConfig = AugmentConfig()
    precision: Literal["auto", "off", "bf16", "fp16"] = "auto"
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    # At most this much work is repeated after a kill; a state of the largest network takes seconds to write.
    checkpoint_minutes: Positive = 10.0
    log_every_steps: Count = 10
    weights: LocalPath | None = None


class PretrainConfig(TrainConfig):
    """Masked image modelling on pixels (iTPN, section 4)."""

    method: Literal["masked_pixels"] = "masked_pixels"
    # As in MAE; both papers keep it.
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75


class ClassifyConfig(TrainConfig):
    """Supervised classification: intermediate (IN-22K) and final (IN-1K) fine-tuning."""

    method: Literal["classify"] = "classify"
    label_smoothing: Ratio = 0.1
    drop_path: Ratio = 0.0
    # None: as published, that is with relative position bias for HiViT and without for RevCol.
    relative_position: bool | None = None
    # MAE's fine-tuning draws its new head this small; a larger one disturbs the pre-trained layers.
    head_init_std: Positive = 2e-5
    # Resize the short side to 256, crop 224: the protocol of the published rows.
    eval_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 224 / 256
    eval_batch: Count = 64


class LinearConfig(TrainConfig):
    """Linear classification as papers train it: augmented images through the frozen network, every epoch."""


class ProbeConfig(Section):
    """k-nearest-neighbour and linear classification on frozen features.

    Without `linear` the linear classifier is trained on features computed once, from centre crops, by
    `epochs`, `batch` and `base_lr`.
    """

    linear: LinearConfig | None = None
    # Features are computed once, so these 90 epochs cost minutes even for ImageNet.
    epochs: Count = 90
    batch: Count = 1024
    base_lr: Positive = 0.1
    # k = 20 and temperature 0.07: the weighted k-NN of DINO, which SelfPatch reports with.
    neighbours: Count = 20
    temperature: Positive = 0.07
    eval_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 224 / 256


class DenseOptimConfig(AdamWConfig):
    """AdamW for detection and segmentation: the learning rate is absolute, the warm-up counts steps."""

    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    # mmdetection and mmsegmentation state their warm-up in steps.
    warmup_steps: Annotated[int, Field(ge=0)] = 500


class DenseConfig(Section):
    """What detection and segmentation share."""

    global_batch: Count
    optim: DenseOptimConfig
    drop_path: Ratio = 0.0
    pyramid_depth: Count | None = None
    flip_probability: Ratio = 0.5
    precision: Literal["auto", "off", "bf16", "fp16"] = "auto"
    checkpoint_minutes: Positive = 10.0
    log_every_steps: Count = 50
    weights: LocalPath | None = None


class DetectConfig(DenseConfig):
    """COCO detection and instance segmentation with Mask R-CNN or Cascade Mask R-CNN.

    The defaults are iTPN's (section 9). ViTDet's (arXiv 2203.16527) are large-scale jitter, two convolutions
    before the proposals, layer norm in box and mask head, and L1 on box deltas. Large-scale jitter resizes
    to `jitter_size` times a ratio of `jitter_range`, then crops and pads to that square; `multi_scale` takes
    one of `short_sides`. Batch norm is in the box head only.
    """

    head: Literal["mask_rcnn", "cascade_mask_rcnn"] = "mask_rcnn"
    epochs: Positive
    lr_drop_epochs: tuple[Positive, ...] = ()
    # DETR's sizes, which the detection rows of all papers train with.
    short_sides: tuple[Pixels, ...] = tuple(range(480, 801, 32))
    long_side: Pixels = 1333
    crop_branch: bool = True
    augment: Literal["multi_scale", "large_scale_jitter"] = "multi_scale"
    jitter_size: Pixels = 1024
    jitter_range: Range = (0.1, 2.0)
    test_size: tuple[Pixels, Pixels] = (1333, 800)
    head_width: Count = 256
    fc_width: Count = 1024
    anchor_scale: Positive = 8.0
    proposals: Count = 1000
    rpn_convs: Count = 1
    head_norm: Literal["batch", "layer"] = "batch"
    box_loss: Literal["giou", "l1"] = "giou"


class Mask2FormerConfig(Section):
    """Sizes of Mask2Former (arXiv 2112.01527); `points` are compared per mask in matching and loss."""

    queries: Count = 100
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 256
    heads: Count = 8
    feed_forward_width: Annotated[int, Field(ge=2)] = 2048
    encoder_layers: Count = 6
    decoder_layers: Count = 9
    points: Count = 12_544


class SegmentConfig(DenseConfig):
    """ADE20K semantic segmentation with UPerNet (iTPN, section 10) or Mask2Former.

    In tests a window of `crop_size` slides by `stride` (UPerNet's way, if `inference` does not say), or the
    network sees whole pictures (Mask2Former's). With `multi_scale_ratios` there is a second figure: the mean
    over these sizes, each also mirrored.
    `head_width` and `auxiliary_width` are UPerNet's.
    """

    head: Literal["upernet", "mask2former"] = "upernet"
    steps: Count
    crop_size: Pixels = 512
    scale: tuple[Pixels, Pixels] = (2048, 512)
    resize_range: Range = (0.5, 2.0)
    photometric: bool = True
    inference: Literal["slide", "whole"] | None = None
    # Two thirds of the window, as UPerNet rows are tested.
    stride: Pixels = 341
    head_width: Count = 768
    auxiliary_width: Count = 256
    mask2former: Mask2FormerConfig = Mask2FormerConfig()
    multi_scale_ratios: tuple[Positive, ...] = ()


class EvaluateConfig(Section):
    """The independent measurement of the fine-tuned network."""

    batch: Count = 64
    throughput_batch: Count = 8
    # The median is taken: the first rounds may still warm caches.
    throughput_rounds: Count = 5
    eval_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 224 / 256


class ReportConfig(Section):
    """The page at the end."""

    sample_images: Count = 12


class Recipe(Section):
    """One reproduction, complete. `stages` names the stages that this method has, in any order.

    `start_from` says for a stage whose weights it takes, where that is not the usual one: the pre-trained
    network for dense tasks, the result of the step before for the others.
    """

    name: str
    profile: str
    summary: str
    source: SourceConfig
    seed: int = 0
    stages: tuple[StageName, ...]
    start_from: dict[StageName, StageName] = {}
    data: DataConfig
    model: ModelConfig
    pretrain: PretrainConfig | None = None
    intermediate: ClassifyConfig | None = None
    finetune: ClassifyConfig | None = None
    probe: ProbeConfig | None = None
    detect: DetectConfig | None = None
    segment: SegmentConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    expect: tuple[Expectation, ...] = ()
    not_comparable: str = ""
    discrepancies: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _stages_have_sections(self) -> Recipe:
        for stage in self.stages:
            # prepare reads the section `data`, which has a default.
            if stage != "prepare" and getattr(self, stage) is None:
                raise ValueError(
                    f"stage '{stage}' is listed in stages, but the recipe has no '{stage}:' section"
                )
        for stage, feeder in self.start_from.items():
            if stage in self.stages and feeder not in self.stages:
                raise ValueError(f"stage '{stage}' starts from '{feeder}', which is not listed in stages")
            if feeder not in _FEEDERS[: max(0, _ORDER.index(stage) - 1)]:
                raise ValueError(f"stage '{stage}' cannot start from '{feeder}', which has no weights for it")
        return self
