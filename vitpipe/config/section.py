"""What every part of a recipe is made of: the frozen base and the kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
# At least one 16-pixel unit; beyond 4096 a typing mistake is likelier than such an image.
Pixels = Annotated[int, Field(ge=16, le=4096)]
Range = tuple[Positive, Positive]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, unknown keys refused, numbers not guessed from text."""

    # Not strict: YAML reads `lr: 1` as an int where a float is meant. Defaults are validated, too.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)
