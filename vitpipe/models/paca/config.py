"""PaCa-ViT in a recipe: options and the sizes that there are; imports no torch.

PaCa-ViT: Learning Patch-to-Cluster Attention in Vision Transformers; Ryan Grainger et al.; CVPR 2023.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Effects, Positive
from vitpipe.contracts.graph import NetworkKind
from vitpipe.models.paca.paca_shapes import SHAPES, STRIDE

_PACA = "PaCa-ViT (Grainger et al., arXiv 2203.11987)"
_Number = Annotated[int, Field(ge=0)]
Clusters = tuple[_Number, _Number, _Number, _Number]


class PacaConfig(ModelConfig):
    """A PaCa network.

    `clusters` is M of the four stages, the size's own if not given; a stage with 0 attends to all patches.
    `clustering` assigns patches by convolutions, by an MLP or by one linear map; the sizes with a teacher
    have it instead. With `assignment: block` every block assigns anew, otherwise the first of a stage does
    for all. Detection and segmentation take `dense_clusters` instead of `clusters`, where given.
    `head_init_std` is that of a new classification head's weight.
    """

    effects: ClassVar[Effects] = Effects(
        weights="clusters clustering assignment dense_clusters head_init_std",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier", "dense")

    clusters: Clusters | None = None
    clustering: Literal["conv", "mlp", "linear"] = "conv"
    assignment: Literal["stage", "block"] = "stage"
    dense_clusters: Clusters | None = None
    head_init_std: Positive = 0.02

    @property
    def token_pixels(self) -> int:
        """Of the last stage."""
        return STRIDE

    @property
    def num_clusters(self) -> tuple[int, ...]:
        """M of the four stages."""
        return self.clusters or SHAPES[self.name].clusters

    @property
    def has_teacher(self) -> bool:
        """Whether a convolutional pyramid assigns the patches."""
        return SHAPES[self.name].teacher_depths is not None

    @property
    def shows_attention(self) -> bool:
        """That of the last block, through its clusters where it has any."""
        return True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size < STRIDE:
            raise ValueError(
                f"image_size {self.image_size} is below {STRIDE} pixels, a patch of the last stage"
            )
        shape = SHAPES.get(self.name)
        if shape is None:  # a wrong name is reported by itself
            return self
        own = self.clusters or shape.clusters
        if shape.teacher_depths is not None:
            if self.clustering != "conv" or self.assignment != "stage":
                raise ValueError(f"'{self.name}' has a teacher: clustering and assignment do not apply to it")
            if 0 in own or 0 in (self.dense_clusters or own):
                raise ValueError(f"'{self.name}' has a teacher: every stage needs at least one cluster")
        if self.dense_clusters and [m == 0 for m in self.dense_clusters] != [m == 0 for m in own]:
            raise ValueError(
                f"dense_clusters {list(self.dense_clusters)} must be 0 where clusters {list(own)} are, and "
                "only there: the weights are other ones"
            )
        return self


CONFIG = PacaConfig
# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again, and compares
# with `published_params` (the README's tables) within 2 %.
ENTRIES: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="paca_nano",
        summary="blocks 1-1-2-1, channels 16 to 64: our own, for a laptop and the demo",
        paper="ours, after " + _PACA,
        published_params=None,
        classifier_params=254_008,
        classifier_macs=4_796_672,
        image_size=64,
        num_layers=7,
    ),
    ModelEntry(
        name="paca_tiny",
        summary="blocks 2-2-4-2, channels 96 to 384",
        paper=_PACA,
        published_params=12.2,
        classifier_params=12_200_680,
        classifier_macs=3_219_262_208,
        image_size=224,
        num_layers=12,
    ),
    ModelEntry(
        name="paca_small",
        summary="blocks 3-3-10-3, channels 96 to 384",
        paper=_PACA,
        published_params=22.0,
        classifier_params=22_037_704,
        classifier_macs=5_501_010_944,
        image_size=224,
        num_layers=21,
    ),
    ModelEntry(
        name="paca_base",
        summary="blocks 3-3-18-3, channels 96 to 512",
        paper=_PACA,
        published_params=46.9,
        classifier_params=46_911_304,
        classifier_macs=9_536_566_784,
        image_size=224,
        num_layers=29,
    ),
    ModelEntry(
        name="paca_teacher_tiny",
        summary="blocks 2-2-2-2 with a clustering teacher",
        paper=_PACA,
        published_params=None,
        classifier_params=12_483_672,
        classifier_macs=3_424_064_768,
        image_size=224,
        num_layers=10,
    ),
    ModelEntry(
        name="paca_teacher_small",
        summary="blocks 3-3-7-3 with a clustering teacher",
        paper=_PACA,
        published_params=21.1,
        classifier_params=21_075_064,
        classifier_macs=5_482_396_928,
        image_size=224,
        num_layers=18,
    ),
    ModelEntry(
        name="paca_teacher_base",
        summary="blocks 3-3-16-3 with a clustering teacher",
        paper=_PACA,
        published_params=None,  # the README's 46.7 fits no network that its code builds
        classifier_params=47_659_192,
        classifier_macs=9_770_973_184,
        image_size=224,
        num_layers=27,
    ),
)
