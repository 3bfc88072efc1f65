"""`params.yaml`: which recipe, at which size, and what of the recipe is changed.

    recipe: itpn/pixel_base
    profile: demo
    seed: 3                         # keys of the recipe; null leaves the recipe's value
    finetune: {epochs: 5, optim: {base_lr: null}}
    overrides: [probe.epochs=10]    # the same as texts; a null here is a value, and it counts after the keys

Keys are a mapping because DVC knows parameters by their place in one: `dvc params diff` shows them and
`dvc exp run -S finetune.epochs=5` changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitpipe.config.places import PlacedText
from vitpipe.config.read import check_profile, read_mapping, recipe_path
from vitpipe.config.recipe import Recipe
from vitpipe.config.yaml_core import WrittenFloat, WrittenInt, read_yaml, write_yaml
from vitpipe.contracts.errors import RecipeError, shortened
from vitpipe.contracts.spelling import did_you_mean


@dataclass(frozen=True)
class Params:
    """What `params.yaml` chooses: a recipe, a profile, overrides in the form `a.b=c`."""

    recipe: str
    profile: str
    overrides: tuple[str, ...] = ()


_OWN_KEYS = ("recipe", "profile", "overrides", "plugins")


def load_params(path: Path) -> Params:
    """Read `params.yaml`; its key `plugins` has been read when vitpipe started (`cli.main`).

    Raises:
        RecipeError: when the file is missing, not YAML, or has other keys than its own and those of a
            recipe; or when there is no such recipe or profile.
    """
    if not path.exists():
        raise RecipeError(
            f"There is no '{shortened(path)}' here",
            where=Path.cwd(),
            fix="start in the folder of the project, give the file by --params, or name a recipe by --recipe",
        )
    values = read_mapping(path)
    # `name` is what the key `recipe` says.
    known = (*_OWN_KEYS, *(key for key in Recipe.model_fields if key != "name"))
    wrong = [_unknown(str(key), known) for key in values if key not in known]
    required = _OWN_KEYS[:2]
    wrong += [f"'{key}' is missing or not a text" for key in required if not isinstance(values.get(key), str)]
    texts = values.get("overrides") or []
    if not isinstance(texts, list) or any(not isinstance(item, str) for item in texts):
        wrong.append("'overrides' must be a list of texts in the form \"section.key=value\"")
    of_recipe = {key: value for key, value in values.items() if key in known and key not in _OWN_KEYS}
    leaves = list(_leaves(of_recipe))
    wrong += [
        f"the key '{key}' below '{keys[0]}' holds . or =: write a mapping below a mapping"
        for keys, _ in leaves
        for key in keys
        if "." in key or "=" in key
    ]
    if wrong:
        raise RecipeError(
            "; ".join(wrong), where=path, fix="give recipe, profile and, where needed, keys of the recipe"
        )
    recipe_path(values["recipe"], f"'recipe' in {path}")
    check_profile(values["profile"], f"'profile' in {path}")
    changed = [f"{'.'.join(keys)}={_text(value)}" for keys, value in leaves if value is not None]
    placed = tuple(PlacedText.at(path, text) for text in (*changed, *texts))
    return Params(values["recipe"], values["profile"], placed)


def choose(
    recipe: str | None, profile: str | None, overrides: Sequence[str], params: Path, *, default_profile: str
) -> Params:
    """What the command line names, else what `params.yaml` names; overrides of both.

    Args:
        recipe: as given; with one, `params` is not read.
        default_profile: of a recipe that is given without a profile.

    Raises:
        RecipeError: as `load_params`.
    """
    if recipe is not None:
        return Params(recipe, profile or default_profile, tuple(overrides))
    chosen = load_params(params)
    return Params(chosen.recipe, profile or chosen.profile, (*chosen.overrides, *overrides))


def _unknown(key: str, known: Sequence[str]) -> str:
    if key.partition(".")[0] in known:
        first, _, rest = key.partition(".")
        return f"'{key}' is no key of params.yaml: write `{first}: {{{rest}: ...}}`"
    return f"'{key}' is not a key of params.yaml{did_you_mean(key, known)}"


def _leaves(values: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no mapping, with the keys that lead to it."""
    for key, value in values.items():
        keys = (*above, str(key))
        # An empty one is a value: harmless for a section, and for a number a mistake that is named.
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, keys)
        else:
            yield keys, value


def _text(value: Any) -> str:
    """A value as the text of an override: as written where that is read as the same value."""
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.written
    if isinstance(value, str) and value == value.strip() and _is_same(value):
        return value
    # PyYAML ends the document of a lone scalar by a line of dots.
    return write_yaml(value).removesuffix("...\n").strip()


def _is_same(text: str) -> bool:
    try:
        return bool(read_yaml(text) == text)
    except yaml.YAMLError:
        return False
