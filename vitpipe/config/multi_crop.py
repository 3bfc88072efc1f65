"""Several views of an image: a part of the options of methods that compare views."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.section import (
    Effects,
    NotNegative,
    Pixels,
    Range,
    Ratio,
    RatioRange,
    Section,
)


class CropsConfig(Section):
    """Several views of an image (multi-crop): two global ones and `num_local` smaller ones.

    Jitter is brightness, contrast, saturation, hue; blur is the radius of Pillow's Gaussian filter. The
    defaults are SelfPatch's; DINO's public baseline takes global areas of 0.4 to 1, local ones to 0.4.
    """

    effects: ClassVar[Effects] = Effects(
        weights=(
            "global_size local_size num_local global_scale local_scale crop_ratio interpolation "
            "flip_probability jitter jitter_probability grey_probability blur_radius blur_probability "
            "solarise_probability"
        ),
    )

    global_size: Pixels = 224
    local_size: Pixels = 96
    num_local: Annotated[int, Field(ge=0)] = 8
    global_scale: RatioRange = (0.25, 1.0)
    local_scale: RatioRange = (0.05, 0.25)
    crop_ratio: Range = (0.75, 4.0 / 3.0)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip_probability: Ratio = 0.5
    jitter: tuple[NotNegative, NotNegative, NotNegative, NotNegative] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: Ratio = 0.8
    grey_probability: Ratio = 0.2
    blur_radius: Range = (0.1, 2.0)
    blur_probability: tuple[Ratio, Ratio, Ratio] = (1.0, 0.1, 0.5)
    solarise_probability: tuple[Ratio, Ratio, Ratio] = (0.0, 0.2, 0.0)
