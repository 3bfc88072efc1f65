"""What every part of a recipe is made of: the frozen base and the kinds of numbers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from vitpipe.config.written_values import as_field

if TYPE_CHECKING:  # its classes are sections
    from vitpipe.config.model import ModelConfig

Auto = Literal["auto"]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
# torch refuses a rate that does not fit float32; the margin is for the scaling by the batch.
LearningRate = Annotated[float, Field(gt=0.0, le=1e30)]
NotNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
# At least one 16-pixel unit; beyond 4096 a typing mistake is likelier than such an image.
Pixels = Annotated[int, Field(ge=16, le=4096)]


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the lower end {pair[0]:g} is above the upper end {pair[1]:g}")
    return pair


def refuse_twice(key: str, names: Iterable[str]) -> None:
    """Refuse a list that names something twice.

    Raises:
        ValueError: names it.
    """
    if again := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"'{key}' names '{again[0]}' twice")


Range = Annotated[tuple[Positive, Positive], AfterValidator(_in_order)]
RatioRange = Annotated[tuple[Ratio, Ratio], AfterValidator(_in_order)]


class Effects:
    """What each key of a section can change; every key stands in one of the three lists.

    Args:
        weights: keys that decide the trained weights, or the bytes of the prepared data.
        figures: keys that decide what is measured, logged or shown of them.
        nothing: keys that decide how fast a run goes, or whether its result is accepted.
    """

    def __init__(self, weights: str = "", figures: str = "", nothing: str = "") -> None:
        self.weights, self.figures, self.nothing = (set(text.split()) for text in (weights, figures, nothing))


class Section(BaseModel):
    """Base of every part of a recipe: frozen, unknown keys refused, numbers not guessed from text.

    Attributes:
        effects: what its own keys can change; those of base classes stand there. A section that is the value
            of a key is looked into: its keys count only as far as that key does.
    """

    effects: ClassVar[Effects] = Effects()
    # Not strict: YAML reads `lr: 1` as an int where a float is meant. Defaults are validated, too.
    # Infinity and NaN are no values of any key: a run of infinite epochs, a rate that is no number.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """A text takes the scalar as it was written; a number takes no true or false."""
        return as_field(value, cls.model_fields[str(info.field_name)].annotation)

    def acting(self, *, on_weights_only: bool = False) -> dict[str, Any]:
        """The values that can change a result, as plain values.

        Args:
            on_weights_only: leave out those that only change what is measured of it.
        """
        plain = self.model_dump(mode="json")
        acting = plain.keys() & _acting_keys(type(self), on_weights_only)
        return {key: _acting(getattr(self, key), plain[key], on_weights_only) for key in acting}

    def network_misfit(self, model: ModelConfig) -> str:
        """Why a stage with this section cannot use the recipe's network, in words; empty if it can."""
        return ""

    @classmethod
    def undecided(cls) -> list[str]:
        """Keys that stand in none of the lists of `effects`, or in several; a test keeps it empty."""
        return [key for key in cls.model_fields if len(cls._effects_of(key)) != 1]

    @classmethod
    def _effects_of(cls, key: str) -> list[str]:
        """The lists that name a key, those of the nearest class that has it."""
        for kind in cls.__mro__:
            named = [name for name, keys in vars(vars(kind).get("effects", Effects())).items() if key in keys]
            if named:
                return named
        return []


@functools.cache  # a report asks hundreds of times: for each published number, twice for each stage before it
def _acting_keys(kind: type[Section], on_weights_only: bool) -> frozenset[str]:
    """Keys of a section that can change a result."""
    counted = {"weights"} if on_weights_only else {"weights", "figures"}
    # A key that nobody has decided on counts: what is unknown may change a result.
    return frozenset(
        key for key in kind.model_fields if counted.intersection(kind._effects_of(key) or ["weights"])
    )


def _acting(value: Any, plain: Any, on_weights_only: bool) -> Any:
    if isinstance(value, Section):
        return value.acting(on_weights_only=on_weights_only)
    if isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
        return [_acting(item, part, on_weights_only) for item, part in zip(value, plain, strict=True)]
    return plain
