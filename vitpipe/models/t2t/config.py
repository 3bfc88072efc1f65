"""T2T-ViT in a recipe: options and the sizes that there are; imports no torch.

Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet; Li Yuan, Yunpeng Chen, Tao Wang,
Weihao Yu, Yujun Shi, Zihang Jiang, Francis EH Tay, Jiashi Feng, Shuicheng Yan; ICCV 2021, arXiv 2101.11986.
"""

from __future__ import annotations

from typing import ClassVar

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Effects, Positive
from vitpipe.contracts.graph import NetworkKind

_T2T = "Tokens-to-Token ViT (Yuan et al., ICCV 2021, arXiv 2101.11986)"


class T2TConfig(ModelConfig):
    """A T2T-ViT with performers in its front end. `head_init_std` is that of a new head's weight."""

    effects: ClassVar[Effects] = Effects(
        weights="head_init_std",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier")
    stride: ClassVar[int] = 16

    head_init_std: Positive = 0.02

    @property
    def shows_attention(self) -> bool:
        """That of the class token."""
        return True

    @property
    def num_frozen_blocks(self) -> int:
        """All of them: every block has a class token."""
        return self.entry.num_layers - 2  # without input and head


CONFIG = T2TConfig

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again, and compares
# with `published_params` within 2 %.
ENTRIES = (
    ModelEntry(
        name="t2t_nano",
        summary="4 blocks of 64 channels: our own, for a laptop and the demo",
        paper="ours, after " + _T2T,
        published_params=None,
        classifier_params=299_118,
        classifier_macs=10_317_824,
        image_size=64,
        num_layers=6,  # input, 4 blocks, head
    ),
    ModelEntry(
        name="t2t_vit_14",
        summary="14 blocks of 384 channels, 6 heads",
        paper=_T2T,
        published_params=21.5,  # table 3
        classifier_params=21_465_806,  # and 79,744 fixed numbers: positions, random features
        classifier_macs=4_783_468_544,
        image_size=224,
        num_layers=16,
    ),
)
