"""Plain vision transformers in a recipe: sizes and options; imports no torch.

Sizes are DeiT's (Touvron et al., arXiv 2012.12877, table 1), `vit_large` is ViT's own. DINO, EsViT, MoBY and
MoCo-v3 pre-train them with a class token, SelfPatch (Yun et al., CVPR 2022) without. `vit_base_drloc` is
another implementation of ViT-B/16 (Dosovitskiy et al., arXiv 2010.11929), trained from scratch by drloc (Liu
et al., NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Count, Effects, Positive
from vitpipe.contracts.graph import NetworkKind

_DRLOC = "vit_base_drloc"
_VIT = "An Image is Worth 16x16 Words (Dosovitskiy et al., arXiv 2010.11929)"
_DEIT = "Training data-efficient image transformers & distillation (Touvron et al., arXiv 2012.12877)"


class ViTConfig(ModelConfig):
    """A plain vision transformer.

    `pooling` says what stands for the whole image: a class token among the patches, followed by a last norm
    (DINO, DeiT); `class_attention`, two blocks in which a token of its own looks at the patches, behind a
    trunk without class token and last norm (SelfPatch); or the mean of the normed patches. `heads` of
    attention is the size's own if not given: MoCo-v3 takes 12 for vit_small. `position: sincos` is a fixed
    table, `none` leaves positions out. `position_resize: offset` resizes the table to other grids as DINO and
    SelfPatch do, `plain` as EsViT does. The maps of segmentation all have the patch's stride (`single`) or,
    as in detection, those from 4 to 32 (`pyramid`). `head_init_std` is that of a new classification head's
    weight, null for torch's initial values, which `vit_base_drloc` has if nothing is given.
    """

    effects: ClassVar[Effects] = Effects(
        weights="patch_size pooling heads position position_resize segment_maps head_init_std",
    )

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier", "dense")

    patch_size: Count = 16
    pooling: Literal["class_token", "class_attention", "mean"] = "class_token"
    heads: Count | None = None
    position: Literal["learned", "sincos", "none"] = "learned"
    position_resize: Literal["offset", "plain"] = "offset"
    segment_maps: Literal["single", "pyramid"] = "single"
    head_init_std: Positive | None = 0.02

    @property
    def token_pixels(self) -> int:
        """The side of a patch."""
        return self.patch_size

    @property
    def shows_attention(self) -> bool:
        """That of the class token or of the aggregation module."""
        return self.pooling != "mean"

    @property
    def num_frozen_blocks(self) -> int:
        """All of them, where a class token or the aggregation module reads every block."""
        return 1 if self.pooling == "mean" else self.entry.num_layers - 2  # without input and head

    @model_validator(mode="before")
    @classmethod
    def _head_as_its_network(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("name") != _DRLOC or "head_init_std" in values:
            return values
        return {**values, "head_init_std": None}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.segment_maps == "pyramid" and self.patch_size & (self.patch_size - 1):
            raise ValueError(
                f"no pyramid of strides 4 to 32 can be made of patches of {self.patch_size} pixels"
            )
        return self


CONFIG = ViTConfig

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again.
ENTRIES = (
    ModelEntry(
        name="vit_nano",
        summary="4 blocks of 64 channels: our own, for a laptop and the demo (patch_size 8)",
        paper="ours, after " + _DEIT,
        published_params=None,
        classifier_params=315_432,
        classifier_macs=4_340_736,
        image_size=64,
        num_layers=6,  # input, 4 blocks, head
    ),
    ModelEntry(
        name="vit_tiny",
        summary="12 blocks of 192 channels, 3 heads",
        paper=_DEIT,
        published_params=None,  # table 1 rounds it to 5 million
        classifier_params=5_717_416,
        classifier_macs=1_253_683_200,
        image_size=224,
        num_layers=14,
    ),
    ModelEntry(
        name="vit_small",
        summary="12 blocks of 384 channels, 6 heads",
        paper=_DEIT,
        published_params=22.0,  # table 1
        classifier_params=22_050_664,
        classifier_macs=4_598_882_304,
        image_size=224,
        num_layers=14,
    ),
    ModelEntry(
        name="vit_base",
        summary="12 blocks of 768 channels, 12 heads",
        paper=_DEIT,
        published_params=86.0,  # table 1
        classifier_params=86_567_656,
        classifier_macs=17_563_828_224,
        image_size=224,
        num_layers=14,
    ),
    ModelEntry(
        name="vit_large",
        summary="24 blocks of 1024 channels, 16 heads",
        paper=_VIT,
        published_params=307.0,  # table 1
        classifier_params=304_326_632,
        classifier_macs=61_554_712_576,
        image_size=224,
        num_layers=26,
    ),
    ModelEntry(
        name=_DRLOC,
        summary="12 blocks of 768 channels, 12 heads: drloc's ViT-B/16, qkv without bias",
        paper=_VIT + ", as drloc has it",
        published_params=86.4,  # drloc's supplement, section 3
        classifier_params=86_540_008,
        classifier_macs=17_563_828_224,
        image_size=224,
        num_layers=14,
    ),
)
