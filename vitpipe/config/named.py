"""A recipe section that is chosen by its name among all that there are of a kind: a method, a head.

    pretrain:
      method: {name: masked_pixels, mask_ratio: 0.75}

The settings stand with the thing itself, for example `vitpipe/methods/<name>/config.py`; a plugin brings its
own. A text alone is the name: `method: classify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BeforeValidator

from vitpipe.config.section import Effects, Section
from vitpipe.contracts.discovery import kind_and_name, names_in, part_of, source_of
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.spelling import did_you_mean

# Recipe keys that hold such a section.
NAMED_KEYS = ("head", "method")


class NamedSection(Section):
    """Base of the settings of one of a kind. A subclass has `name: Literal["<its folder>"]`."""

    effects: ClassVar[Effects] = Effects(
        weights="name",
    )

    name: str


Named = TypeVar("Named", bound=NamedSection)


def settings_of(package: str, name: str) -> Any:
    """The settings of one of a kind with their defaults.

    Args:
        package: of the kind, for example `vitpipe.methods`; see `contracts.discovery`.
    """
    return _settings_class(package, name)(name=name)


def one_of(package: str, kind: str, default: str, **fixed: Any) -> BeforeValidator:
    """Validation of the settings of one of a kind: a name, or a mapping with `name` and settings.

    Args:
        package: of the kind.
        kind: what it is called in messages.
        default: the name, where a mapping has none.
        fixed: attributes of `config.py` and the values that they must have.
    """
    # Looked up when a recipe is read, and not by a union of classes that is made at import: only the chosen
    # one's file is imported, and plugins that are named later are found.
    return BeforeValidator(_reader(package, kind, default, fixed))


def overlaid(old: Any, new: Any) -> tuple[Any, Any]:
    """Two values of a key of `NAMED_KEYS` as mappings to merge; `None` for the old one of another name."""
    # As in the rest of a recipe settings add up; but those of one method mean nothing to another.
    before, after = ({"name": value} if isinstance(value, str) else value for value in (old, new))
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return None, new
    is_other = "name" in before and after.get("name", before["name"]) != before["name"]
    return (None if is_other else before), after


def _reader(package: str, kind: str, default: str, fixed: Mapping[str, Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, NamedSection):
            return value
        settings = {"name": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping):
            raise ValueError(f"give the name of a {kind}, or a mapping with `name` and its settings")
        name, known = settings.get("name", default), _names(package, fixed)
        if name not in known:
            listed = ", ".join(known)
            raise ValueError(f"there is no {kind} '{name}'{did_you_mean(name, known)} (known: {listed})")
        chosen = _settings_class(package, name)
        for key in settings:
            if key not in chosen.model_fields:
                hint = did_you_mean(key, chosen.model_fields)
                raise ValueError(f"{kind} '{name}' has no option '{key}'{hint}")
        # A wrong value's error keeps its path, `pretrain.method.mask_ratio`.
        return chosen.model_validate({**settings, "name": name})

    return read


def _names(package: str, fixed: Mapping[str, Any]) -> tuple[str, ...]:
    if not fixed:
        return names_in(package)
    return tuple(
        name
        for name in names_in(package)
        if all(part_of(package, name, "config", key) == value for key, value in fixed.items())
    )


def _settings_class(package: str, name: str) -> type[NamedSection]:
    """The type of the settings of one of a kind.

    Raises:
        InputError: when it cannot be used; names the file.
    """
    found: type[NamedSection] = part_of(package, name, "config", "CONFIG", NamedSection)
    accepted = get_args(found.model_fields["name"].annotation)
    if accepted and accepted != (name,):
        raise InputError(
            f"{kind_and_name(package, name)} is named '{accepted[0]}' in its config.py",
            where=source_of(f"{package}.{name}.config") or name,
            fix=f'write name: Literal["{name}"] = "{name}", as the folder is named',
        )
    return found
