"""Options of masked pre-training on a frozen teacher's features; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import model_validator

from vitpipe.config.data import LocalPath
from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.section import Count, Effects, Ratio, Section
from vitpipe.config.train_sections import MIXING
from vitpipe.contracts.graph import NetworkKind


class TeacherConfig(Section):
    """The frozen teacher: an image tower of CLIP from a file, or a small one with random weights.

    The file is OpenAI's archive, OpenCLIP's or Hugging Face's; `vitpipe convert` takes the same. `activation`
    is `quick_gelu` of OpenAI's weights, or `gelu` of most that OpenCLIP has trained: no file tells it. With
    `pixels: released` the teacher gets images as iTPN's released code gives them, values moved from 0 ... 1
    to 0.5 ... 1, which looks like an oversight.
    """

    effects: ClassVar[Effects] = Effects(
        weights="name file activation pixels",
    )

    name: Literal["clip_b16", "clip_l14", "random"] = "random"
    file: LocalPath | None = None
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    pixels: Literal["unit", "released"] = "unit"

    @model_validator(mode="after")
    def _has_its_file(self) -> TeacherConfig:
        if self.name == "random" and self.file is not None:
            raise ValueError(
                f"teacher 'random' reads no file, but file is {self.file}: set it to null, or name clip_b16 "
                "or clip_l14"
            )
        if self.name != "random" and self.file is None:
            raise ValueError(f"teacher '{self.name}' needs its weights: give file, for example ViT-B-16.pt")
        return self


class MaskedFeaturesConfig(MethodConfig):
    """Masked prediction of a teacher's features (iTPN, supplement, table 9).

    `masked_units` of an image are hidden in blocks of at least `smallest_block` units. With `lateral_masking:
    aligned` they are hidden at all levels of the pyramid, as the supplement asks for; with `none` the finer
    levels pass beside the mask, as in the released code. `drop_path` is that of the last block.
    """

    effects: ClassVar[Effects] = Effects(
        weights="name teacher masked_units smallest_block lateral_masking drop_path",
    )

    ignored_augment: ClassVar[tuple[str, ...]] = ("rand_augment", "erase_probability", *MIXING)
    builds: ClassVar[tuple[NetworkKind, ...]] = ("feature_predictor",)

    name: Literal["masked_features"] = "masked_features"
    teacher: TeacherConfig = TeacherConfig()
    # Of the released code: 75 of 196 units at 224 pixels, and of 256 at 256 pixels.
    masked_units: Count = 75
    smallest_block: Count = 16
    lateral_masking: Literal["aligned", "none"] = "aligned"
    drop_path: Ratio = 0.0

    def misfit(self, model: ModelConfig, global_batch: int) -> str:
        """Masks that hide every unit."""
        units = (model.image_size // model.token_pixels) ** 2
        if self.masked_units >= units:
            return f"masked_units is {self.masked_units}, but an image has {units} units: hide fewer"
        return ""

    def files(self) -> dict[str, Path]:
        """The teacher's."""
        return {} if self.teacher.file is None else {"teacher.file": self.teacher.file}


CONFIG = MaskedFeaturesConfig
