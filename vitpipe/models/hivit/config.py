"""HiViT in a recipe: iTPN's options and the sizes that there are; imports no torch.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Count, Effects, Positive, Section
from vitpipe.contracts.graph import NetworkKind

_ITPN = "Integrally Pre-Trained Transformer Pyramid Networks (Tian et al., arXiv 2211.12735)"
# The layer decay of iTPN's tables 8 and 10 (0.45 ... 0.6) is stated for a ViT of 12 blocks: 13 steps from its
# first layer to its head. The released code spreads it over L = blocks + 1 steps, d^(13/L) per layer: for
# base, 0.5 becomes 0.5^(13/31) = 0.748.
DECAY_STATED_FOR = 13


class PyramidConfig(Section):
    """The feature pyramid that iTPN trains together with its backbone.

    `dense_depth` is the depth in detection and segmentation where it is another one than in pre-training.
    """

    effects: ClassVar[Effects] = Effects(
        weights="width depth dense_depth",
    )

    # Pixel pre-training as released; table 13's parameter counts fit depth 2 (CLIP pre-training takes 1).
    width: Count = 256
    depth: Count = 2
    dense_depth: Count | None = None


class DecoderConfig(Section):
    """The pixel decoder of iTPN's pre-training."""

    effects: ClassVar[Effects] = Effects(
        weights="width depth heads",
    )

    # MAE's decoder, which iTPN keeps.
    width: Count = 512
    depth: Count = 8
    heads: Count = 16


class HiViTConfig(ModelConfig):
    """A HiViT. `head_init_std` is that of a new classification head's weight.

    `relative_position` gives classification, segmentation and pre-training on a teacher's features a learnt
    bias per relative position; pre-training on pixels has none (supplement, tables 7 to 10). Detection has
    none either, or with `detect_position: per_axis` a learnt vector per row and per column. `layer_scale` is
    the initial value of a learnt factor per channel on every branch of the backbone; null for none.
    """

    effects: ClassVar[Effects] = Effects(
        weights="pyramid decoder relative_position detect_position layer_scale head_init_std",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = (
        "encoder",
        "classifier",
        "pretrainer",
        "feature_predictor",
        "dense",
    )
    stride: ClassVar[int] = 16
    num_detection_maps: ClassVar[Literal[4, 5]] = 5

    @property
    def takes_any_size(self) -> bool:
        """Tables of relative positions are made for one grid."""
        return not self.relative_position

    pyramid: PyramidConfig = PyramidConfig()
    decoder: DecoderConfig = DecoderConfig()
    relative_position: bool = True
    detect_position: Literal["none", "per_axis"] = "none"
    layer_scale: Positive | None = None
    # MAE's fine-tuning draws its new head this small; a larger one disturbs the pre-trained layers.
    head_init_std: Positive = 2e-5


CONFIG = HiViTConfig

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again, and compares
# with `published_params` within 2 %.
ENTRIES = (
    ModelEntry(
        name="hivit_nano",
        summary="blocks 1-1-4, channels 16/32/64: our own, for a laptop and the demo",
        paper="ours, after " + _ITPN,
        published_params=None,
        classifier_params=286_280,
        classifier_macs=4_585_984,
        image_size=64,
        num_layers=8,  # stem, 6 blocks, head
        decay_stated_for=DECAY_STATED_FOR,
    ),
    ModelEntry(
        name="hivit_base",
        summary="blocks 3-3-24, channels 128/256/512",
        paper=_ITPN,
        published_params=79.0,  # ImageNet-1K table of the main text: HiViT-B 79, HiViT-L 288
        classifier_params=78_557_992,
        classifier_macs=17_816_604_672,
        image_size=224,
        num_layers=32,  # stem, 30 blocks, head
        decay_stated_for=DECAY_STATED_FOR,
    ),
    ModelEntry(
        name="hivit_large",
        summary="blocks 2-2-40, channels 192/384/768",
        paper=_ITPN,
        published_params=288.0,
        classifier_params=288_493_576,
        classifier_macs=61_117_544_448,
        image_size=224,
        num_layers=46,  # stem, 44 blocks, head
        decay_stated_for=DECAY_STATED_FOR,
    ),
)
