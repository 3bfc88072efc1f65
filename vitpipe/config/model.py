"""The recipe's `model:` section, whose options are those of the named network's family; all without torch.

A family says in `vitpipe/models/<family>/config.py` which networks it has (`ENTRIES`) and which options they
have (`CONFIG`). Nothing here knows a family by name: they are found by their folders, a plugin's too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from vitpipe.config.section import Effects, Pixels, Section
from vitpipe.config.written_values import as_field
from vitpipe.contracts.discovery import names_in, part_of, source_of
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.contracts.graph import NetworkKind
from vitpipe.contracts.spelling import did_you_mean

FAMILIES = "vitpipe.models"


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One network by name.

    Attributes:
        name: as recipes give it in `model.name`.
        family: the folder in `vitpipe.models` that has the entry; `entries` fills it in.
        summary: what it is, in a few words.
        paper: title, authors, arXiv number.
        published_params: parameters in millions as the paper states them; `None` where it does not.
        classifier_params: parameters of the classifier with 1000 classes.
        classifier_macs: multiply-adds of that classifier for one image of `image_size`; one multiply-add
            counts once, attention products included.
        image_size: default input, pixels per side.
        num_layers: layer ids of the classifier with the options' defaults, for layer-wise learning rates.
        decay_stated_for: see `config.resolve.layer_scales`.
    """

    name: str
    family: str = ""
    summary: str
    paper: str
    published_params: float | None
    classifier_params: int
    classifier_macs: int
    image_size: int
    num_layers: int
    decay_stated_for: int | None = None


class ModelConfig(Section):
    """Which network. `name` is one of `vitpipe models`; its family's subclass adds the family's options.

    Attributes:
        builds: what the family's `family.py` builds, so that a recipe with a stage or method that needs more
            is refused when it is read, without torch.
        stride: pixels that the sides of an image must be a multiple of.
        num_detection_maps: 4 at strides 4 to 32, to which the head adds an FPN, or 5 of a pyramid of its own.
    """

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier")
    stride: ClassVar[int] = 1
    num_detection_maps: ClassVar[Literal[4, 5]] = 4

    effects: ClassVar[Effects] = Effects(
        weights="name image_size",
    )

    name: str
    image_size: Pixels = 224

    @field_validator("image_size")
    @classmethod
    def _is_divided(cls, side: int) -> int:
        """The networks check it, too; here it costs no torch and comes before anything is prepared."""
        if side % cls.stride:
            raise ValueError(f"the network needs a multiple of {cls.stride} pixels")
        return side

    @property
    def entry(self) -> ModelEntry:
        """What is stated about the network of this name.

        Raises:
            RecipeError: as `find_model`.
        """
        return find_model(self.name)

    @property
    def token_pixels(self) -> int:
        """Pixels per side of what becomes one token of the last block; sides of crops are multiples of it."""
        return self.stride

    @property
    def takes_any_size(self) -> bool:
        """Whether the encoder takes images of other sizes than `image_size`, as local crops are."""
        return True

    @property
    def num_clusters(self) -> tuple[int, ...]:
        """Clusters of patches in each stage, for stage `explain`; empty for a network without clusters."""
        return ()

    @property
    def shows_attention(self) -> bool:
        """Whether `Encoder.image_attention` gives something."""
        return False

    @property
    def num_frozen_blocks(self) -> int:
        """How many of its last blocks give a vector of the image for `probe.last_blocks`."""
        return 1

    @property
    def num_layers(self) -> int:
        """Layer ids of the classifier with these options; a family whose options change it overrides this."""
        # Also a property of the networks (`Network.num_layers`), which count what they really have: `vitpipe
        # recipe` and `plan` show layer-wise learning rates without torch, which every family.py imports. A
        # test compares the two for every entry and for options that change the number.
        return self.entry.num_layers


def family_names() -> tuple[str, ...]:
    """Names of all families, in alphabetical order."""
    return names_in(FAMILIES)


def config_class(family: str) -> type[ModelConfig]:
    """The section's type for the networks of a family.

    Raises:
        InputError: as `discovery.part_of`.
    """
    found: type[ModelConfig] = part_of(FAMILIES, family, "config", "CONFIG", ModelConfig)
    return found


def families_that_build(kind: NetworkKind) -> list[str]:
    """Names of the families whose networks may be built as this."""
    return [name for name in family_names() if kind in config_class(name).builds]


def entries() -> dict[str, ModelEntry]:
    """All networks by name, family after family.

    Raises:
        InputError: when two families have a network of the same name, or as `discovery.part_of`.
    """
    # Not kept: a plugin may be added at any time before a recipe is read, and this takes microseconds.
    found: dict[str, ModelEntry] = {}
    for family in family_names():
        listed = part_of(FAMILIES, family, "config", "ENTRIES", tuple)
        for entry in listed:
            if not isinstance(entry, ModelEntry):
                raise InputError(
                    f"ENTRIES of the network family '{family}' holds a {type(entry).__name__}",
                    where=source_of(f"{FAMILIES}.{family}.config") or family,
                    fix="list the family's networks as ModelEntry(...)",
                )
            if entry.name in found:
                raise InputError(
                    f"The families '{found[entry.name].family}' and '{family}' both have a network "
                    f"'{entry.name}'",
                    where=source_of(f"{FAMILIES}.{family}.config") or family,
                    fix="give one of the two another name",
                )
            found[entry.name] = dataclasses.replace(entry, family=family)
    return found


def find_model(name: str) -> ModelEntry:
    """The entry with this name.

    Raises:
        RecipeError: when there is none; suggests the most similar name.
    """
    known = entries()
    if name not in known:
        what, fix = _unknown(name, known)
        raise RecipeError(what, where="model.name", fix=fix)
    return known[name]


def named_config(name: str, image_size: int | None = None) -> ModelConfig:
    """The section of a network that a command line names, with its defaults.

    Args:
        image_size: pixels; the published size if not given.

    Raises:
        RecipeError: when there is no such network.
        InputError: when it does not take images of this size.
    """
    entry = find_model(name)
    size = image_size or entry.image_size
    try:
        return model_config({"name": name, "image_size": size})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{name} cannot take images of {size} pixels: {reason}",
            where="--image-size",
            fix="give another size",
        ) from error


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The section from plain values, as the type of the named network's family.

    Raises:
        ValidationError: for an unknown name, and for options and values that the family does not have.
    """
    # A number is the text as it was written, as for every other text.
    name = as_field(values.get("name"), str)
    if not isinstance(name, str):
        # Raises for the name alone: without it nothing can be said about the options.
        return ModelConfig.model_validate(
            {key: values[key] for key in ModelConfig.model_fields if key in values}
        )
    known = entries()
    if name not in known:
        what, fix = _unknown(name, known)
        problem = PydanticCustomError("value_error", "{what} ({fix})", {"what": what, "fix": fix})
        details = InitErrorDetails(type=problem, loc=("name",), input=name)
        raise ValidationError.from_exception_data("model", [details])
    chosen = config_class(known[name].family)
    # Null takes an option out: with it a recipe of one family can be given a network of another, although
    # overrides and profiles can only be laid over what is there.
    foreign = options_of_others(chosen)
    kept = {key: value for key, value in values.items() if value is not None or key not in foreign}
    return chosen.model_validate(kept)


def options_of_others(chosen: type[ModelConfig]) -> set[str]:
    """Options that some other family has, and the one with this section's type has not."""
    every = {field for family in family_names() for field in config_class(family).model_fields}
    return every - set(chosen.model_fields)


def known_options(values: Any) -> type[ModelConfig]:
    """The type that `model_config` would take; the base where the values name no network."""
    name = values.get("name") if isinstance(values, Mapping) else None
    entry = entries().get(name) if isinstance(name, str) else None
    return ModelConfig if entry is None else config_class(entry.family)


def _unknown(name: str, known: Mapping[str, ModelEntry]) -> tuple[str, str]:
    listed = f"give one of {', '.join(known)} (`vitpipe models` describes them)"
    return f"There is no model '{name}'{did_you_mean(name, known)}", listed


def _of_its_family(value: Any, handler: ValidatorFunctionWrapHandler) -> ModelConfig:
    # Not a union with a discriminator: its members would be fixed when this module is imported, before a
    # recipe's plugins are known. Pydantic passes on the mistakes of the inner validation one by one.
    if isinstance(value, Mapping):
        return model_config(value)
    found: ModelConfig = handler(value)
    return found


AnyModel = Annotated[SerializeAsAny[ModelConfig], WrapValidator(_of_its_family)]
"""A field of this type takes the options of any family, and `model_dump` writes them all."""
