"""RevColV2 in a recipe: its options and the sizes that there are; imports no torch.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Count, Effects, Positive
from vitpipe.contracts.graph import NetworkKind
from vitpipe.models.revcol.config import ReversibleConfig

_REVCOLV2 = (
    "RevColV2: Exploring Disentangled Representations in Masked Image Modeling (Han et al., arXiv 2309.01005)"
)
# Of each kind in every size that there is: the fewest with several of each kind.
NUM_COLUMNS = 2


class ColumnsConfig(ReversibleConfig):
    """The columns: how many of each kind, and how they keep activations for the backward pass."""

    effects: ClassVar[Effects] = Effects(
        weights="bottom_up top_down",
    )

    bottom_up: Count = NUM_COLUMNS
    top_down: Count = NUM_COLUMNS


class RevColV2Config(ModelConfig):
    """A RevColV2. `head_init_std` is that of a new classification head's weight."""

    effects: ClassVar[Effects] = Effects(
        weights="columns head_init_std",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier", "pretrainer", "dense")
    stride: ClassVar[int] = 16
    num_detection_maps: ClassVar[Literal[4, 5]] = 5

    columns: ColumnsConfig = ColumnsConfig()
    # The general std of 0.02 times the published head init of 0.001 (tables 2 to 4), as in MAE's fine-tuning.
    head_init_std: Positive = 2e-5

    @property
    def num_layers(self) -> int:
        """Input, blocks of one column + columns - 1, head: one more for every further column."""
        return self.entry.num_layers + self.columns.bottom_up + self.columns.top_down - 2 * NUM_COLUMNS


CONFIG = RevColV2Config

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again, and compares
# with `published_params` within 2 %.
ENTRIES = (
    ModelEntry(
        name="revcolv2_nano",
        summary="2 + 2 columns, 4 x 1 blocks each, 48 channels: our own, for a laptop and the demo",
        paper="ours, after " + _REVCOLV2,
        published_params=None,
        classifier_params=566_164,
        classifier_macs=6_400_896,
        image_size=64,
        num_layers=9,
    ),
    ModelEntry(
        name="revcolv2_base",
        summary="2 + 2 columns, 4 x 3 blocks each, 384 channels (our reading of the paper)",
        paper=_REVCOLV2,
        published_params=88.0,  # supplement, table 5: 88 M and 19 G, 327 M and 67 G
        classifier_params=89_131_240,
        # 12.9 G and not the published 19 G (ours: 18.7 G): only the levels that reach the top are run.
        classifier_macs=12_852_464_640,
        image_size=224,
        num_layers=17,  # RevColV2: input, 4 x 3 blocks of one column + 4 columns - 1, head
    ),
    ModelEntry(
        name="revcolv2_large",
        summary="2 + 2 columns, 4 x 4 blocks each, 640 channels (our reading of the paper)",
        paper=_REVCOLV2,
        published_params=327.0,
        classifier_params=325_140_200,
        classifier_macs=45_692_912_640,
        image_size=224,
        num_layers=21,
    ),
)
