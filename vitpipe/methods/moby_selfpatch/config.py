"""Options of SelfPatch on MoBY; imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.contrast_section import ContrastConfig
from vitpipe.config.distillation_section import Prototypes, neighbours_misfit
from vitpipe.config.model import ModelConfig
from vitpipe.config.section import Count, Effects, Positive, Ratio


class MobySelfPatchConfig(ContrastConfig):
    """MoBY + SelfPatch (Yun et al., CVPR 2022, supplement, table 2); details are ours, by analogy with DINO.

    `patch_prototypes`, `neighbours`, `patch_weight`, temperatures and `centre_momentum` are those of
    SelfPatch. Where the network has no aggregation module of its own (Swin), one with `aggregation_heads`
    stands beside it, and `image_vector` says whether MoBY contrasts the network's pooled vector or the
    module's.
    """

    effects: ClassVar[Effects] = Effects(
        weights=(
            "name patch_prototypes patch_hidden patch_width neighbours patch_weight student_temperature "
            "teacher_temperature centre_momentum aggregation_heads image_vector"
        ),
    )

    name: Literal["moby_selfpatch"] = "moby_selfpatch"
    patch_prototypes: Prototypes = 4096
    patch_hidden: Count = 2048
    patch_width: Count = 256
    neighbours: Annotated[int, Field(ge=1, le=8)] = 4
    patch_weight: Positive = 0.1
    student_temperature: Positive = 0.1
    teacher_temperature: Positive = 0.04
    centre_momentum: Ratio = 0.9
    aggregation_heads: Count | None = None
    image_vector: Literal["pooled", "aggregated"] = "pooled"

    def misfit(self, model: ModelConfig, global_batch: int) -> str:
        """As MoBY, or patches with too few neighbours."""
        grid = (self.crops.global_size // model.token_pixels,) * 2
        return super().misfit(model, global_batch) or neighbours_misfit(self.neighbours, [grid])


CONFIG = MobySelfPatchConfig
