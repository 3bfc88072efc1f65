"""Options of MoBY and of SelfPatch on MoBY; without torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.distillation_section import crops_misfit
from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.multi_crop import CropsConfig
from vitpipe.config.section import Count, Effects, Positive, Ratio, RatioRange
from vitpipe.config.train_sections import SINGLE_VIEW
from vitpipe.contracts.graph import NetworkKind


class ViewsConfig(CropsConfig):
    """Two views without local crops; the defaults are MoBY's augmentation (its released code)."""

    num_local: Annotated[int, Field(ge=0)] = 0
    global_scale: RatioRange = (0.08, 1.0)
    interpolation: Literal["bicubic", "bilinear"] = "bilinear"
    blur_probability: tuple[Ratio, Ratio, Ratio] = (1.0, 0.1, 0.0)
    solarise_probability: tuple[Ratio, Ratio, Ratio] = (0.0, 0.2, 0.0)


class ContrastConfig(MethodConfig):
    """MoBY (Xie et al., arXiv 2105.04553).

    `queue` keys of earlier steps are the negatives of each view, `temperature` divides the similarities.
    Projector and predictor have `head_hidden` and `head_width` channels. The target's momentum rises from
    `teacher_momentum` to 1; `drop_path` is the online network's, the target has none.
    """

    effects: ClassVar[Effects] = Effects(
        weights="crops queue temperature head_hidden head_width teacher_momentum drop_path",
    )

    ignored_augment: ClassVar[tuple[str, ...]] = SINGLE_VIEW
    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder",)

    crops: ViewsConfig = ViewsConfig()
    queue: Count = 4096
    temperature: Positive = 0.2
    head_hidden: Count = 4096
    head_width: Count = 256
    teacher_momentum: Ratio = 0.99
    drop_path: Ratio = 0.2

    def misfit(self, model: ModelConfig, global_batch: int) -> str:
        """Crops that do not fit, local crops, or a queue that the batch does not divide."""
        if self.crops.num_local:
            return f"crops.num_local is {self.crops.num_local}, but it contrasts two views: give 0"
        if global_batch < 2:
            return f"name is {self.name}, whose batch norms need a global_batch of 2 or more"
        if self.queue % global_batch:
            return (
                f"queue is {self.queue}, which is no multiple of the global batch of {global_batch}: the "
                "keys of a step replace the oldest ones"
            )
        return crops_misfit(self.crops, model)
