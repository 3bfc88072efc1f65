"""Plain vision transformers for masked pixels in a recipe: sizes and options; imports no torch.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735, supplement, section
3 and table 11. Masked Autoencoders Are Scalable Vision Learners; Kaiming He et al.; arXiv 2111.06377.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Effects, Positive
from vitpipe.contracts.graph import NetworkKind
from vitpipe.models.hivit.config import DECAY_STATED_FOR, DecoderConfig, PyramidConfig

_ITPN = "Integrally Pre-Trained Transformer Pyramid Networks (Tian et al., arXiv 2211.12735), table 11"


class ITPNViTConfig(ModelConfig):
    """A plain vision transformer without class token, and what pre-training and dense tasks read of it.

    `levels: pyramid` is iTPN: outputs of the 4th and 7th of 12 blocks are split into finer tokens and joined
    with the last one in the pyramid. `levels: last` is MAE: the decoder reads the last block alone, and
    detection and segmentation get maps of four blocks. `relative_position` gives classification and
    segmentation a learnt bias per relative position. `head_init_std` is that of a new classification head.
    """

    effects: ClassVar[Effects] = Effects(
        weights="levels pyramid decoder relative_position head_init_std",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier", "pretrainer", "dense")
    stride: ClassVar[int] = 16

    levels: Literal["pyramid", "last"] = "pyramid"
    pyramid: PyramidConfig = PyramidConfig()
    decoder: DecoderConfig = DecoderConfig()
    relative_position: bool = True
    head_init_std: Positive = 2e-5

    @property
    def num_detection_maps(self) -> Literal[4, 5]:  # type: ignore[override]
        """Of the pyramid five; without it four, to which the head adds an FPN."""
        return 5 if self.levels == "pyramid" else 4

    @property
    def takes_any_size(self) -> bool:
        """Tables of relative positions are made for one grid."""
        return not self.relative_position


CONFIG = ITPNViTConfig

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again.
ENTRIES = (
    ModelEntry(
        name="itpn_vit_nano",
        summary="4 blocks of 64 channels: our own, for a laptop and the demo",
        paper="ours, after " + _ITPN,
        published_params=None,
        classifier_params=316_088,
        classifier_macs=4_127_232,
        image_size=64,
        num_layers=6,  # input, 4 blocks, head
        decay_stated_for=DECAY_STATED_FOR,
    ),
    ModelEntry(
        name="itpn_vit_base",
        summary="12 blocks of 768 channels, 12 heads, without class token",
        paper=_ITPN,
        published_params=None,
        classifier_params=86_671_096,
        classifier_macs=17_471_649_792,
        image_size=224,
        num_layers=14,
        decay_stated_for=DECAY_STATED_FOR,
    ),
)
