"""RevCol in a recipe: its options and the sizes that there are; imports no torch.

Reversible Column Networks; Yuxuan Cai et al.; arXiv 2212.11696.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Effects, Positive, Section
from vitpipe.contracts.graph import NetworkKind

_REVCOL = "Reversible Column Networks (Cai et al., arXiv 2212.11696)"


class ReversibleConfig(Section):
    """How a network of reversible columns keeps activations for the backward pass.

    `memory_mode`: everything (`plain`), the inputs of each column (`column`), or the last column's outputs
    only (`reversible`); `auto` is reversible in float32 and column under autocast, where inverting is not
    accurate. `reversible_autocast` allows it there too.
    """

    effects: ClassVar[Effects] = Effects(
        weights="memory_mode reversible_autocast",
    )

    memory_mode: Literal["auto", "plain", "column", "reversible"] = "auto"
    reversible_autocast: bool = False


class RevColConfig(ModelConfig):
    """A RevCol; its name fixes the number of columns. `head_init_std` is that of the classifier's weight."""

    effects: ClassVar[Effects] = Effects(
        weights="columns head_init_std",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier", "intermediate_heads")
    stride: ClassVar[int] = 32

    columns: ReversibleConfig = ReversibleConfig()
    # MAE's value for a head on pre-trained layers; the released code has 0.02 times a head init scale.
    head_init_std: Positive = 2e-5


CONFIG = RevColConfig

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again, and compares
# with `published_params` within 2 %.
ENTRIES = (
    ModelEntry(
        name="revcol_micro",
        summary="3 columns of 1-1-2-1 blocks, channels 16 to 128: our own, for a laptop and tests",
        paper="ours, after " + _REVCOL,
        published_params=None,
        classifier_params=920_968,
        classifier_macs=9_800_192,
        image_size=64,
        num_layers=9,  # RevCol: stem, blocks of one column + columns - 1, head; here 5 + 3 + 1
    ),
    ModelEntry(
        name="revcol_nano",
        summary="4 columns of 1-1-1-1 blocks, channels 16 to 128: our own, with intermediate supervision",
        paper="ours, after " + _REVCOL,
        published_params=None,
        classifier_params=1_052_616,
        classifier_macs=10_857_472,
        image_size=64,
        num_layers=9,
    ),
    ModelEntry(
        name="revcol_tiny",
        summary="4 columns of 2-2-4-2 blocks, channels 64 to 512",
        paper=_REVCOL,
        published_params=30.0,
        classifier_params=30_456_168,
        classifier_macs=4_517_355_520,
        image_size=224,
        num_layers=15,
    ),
    ModelEntry(
        name="revcol_small",
        summary="8 columns of 2-2-4-2 blocks, channels 64 to 512",
        paper=_REVCOL,
        published_params=60.0,
        classifier_params=60_568_424,
        classifier_macs=9_043_832_832,
        image_size=224,
        num_layers=19,
    ),
    ModelEntry(
        name="revcol_base",
        summary="16 columns of 1-1-3-2 blocks, channels 72 to 576",
        paper=_REVCOL,
        published_params=138.0,
        classifier_params=138_616_408,
        classifier_macs=16_585_449_984,
        image_size=224,
        num_layers=24,
    ),
    ModelEntry(
        name="revcol_large",
        summary="8 columns of 1-2-6-2 blocks, channels 128 to 1024",
        paper=_REVCOL,
        published_params=273.0,
        classifier_params=273_095_400,
        classifier_macs=39_306_092_544,
        image_size=224,
        num_layers=20,
    ),
    ModelEntry(
        name="revcol_xlarge",
        summary="8 columns of 1-2-6-2 blocks, channels 224 to 1792",
        paper=_REVCOL,
        published_params=834.0,
        classifier_params=833_807_400,
        classifier_macs=120_206_026_752,
        image_size=224,
        num_layers=20,
    ),
    ModelEntry(
        name="revcol_huge",
        summary="8 columns of 1-2-6-2 blocks, channels 360 to 2880",
        paper=_REVCOL,
        published_params=2158.0,
        classifier_params=2_157_600_160,
        classifier_macs=310_617_031_680,
        image_size=224,
        num_layers=20,
    ),
)
