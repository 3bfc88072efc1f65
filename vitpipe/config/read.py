"""From YAML and overrides to one validated recipe; every mistake is reported at once.

Order of precedence, later wins: recipe file, `recipes/profiles/<profile>.yaml`, the family's
`recipes/<family>/profiles/<profile>.yaml`, the recipe's own `.../profiles/<recipe>.<profile>.yaml`, overrides
from params.yaml, `--set` on the command line.
Mappings are merged key by key; anything else is replaced.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import RecipeError

RECIPES = Path(__file__).parent.parent / "recipes"
PROFILES = RECIPES / "profiles"
ARTIFACTS = Path("artifacts")
# The names of recipes and profiles; they become folders, MLflow parameters and arguments of commands.
NAME = re.compile(r"[A-Za-z0-9_\-./]+")
# A wrong value may be a whole file pasted into params.yaml; a message shows its beginning.
_SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class Params:
    """What `params.yaml` chooses: a recipe, a profile, overrides in the form `a.b=c`."""

    recipe: str
    profile: str
    overrides: tuple[str, ...] = ()


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error: PyYAML takes the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def recipe_names() -> tuple[str, ...]:
    """Names of all recipes that ship with the package, for example `itpn/pixel_base`."""
    files = (path for path in RECIPES.glob("*/*.yaml") if path.parent != PROFILES)
    return tuple(sorted(f"{path.parent.name}/{path.stem}" for path in files))


def profile_names() -> tuple[str, ...]:
    """Names of all profiles."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.yaml")))


def load_params(path: Path) -> Params:
    """Read `params.yaml`.

    Raises:
        RecipeError: when the file is missing, not YAML, or has other keys than recipe, profile, overrides; or
            when there is no such recipe or profile.
    """
    values = _read_yaml(path)
    allowed = ("recipe", "profile", "overrides")
    wrong = [
        f"'{key}' is not a key of params.yaml{_did_you_mean(key, allowed)}"
        for key in values
        if key not in allowed
    ]
    wrong += [
        f"'{key}' is missing or not a text" for key in allowed[:2] if not isinstance(values.get(key), str)
    ]
    overrides = values.get("overrides") or []
    if not isinstance(overrides, list) or any(not isinstance(item, str) for item in overrides):
        wrong.append("'overrides' must be a list of texts in the form \"section.key=value\"")
    if wrong:
        raise RecipeError("; ".join(wrong), where=path, fix="give recipe, profile and, if needed, overrides")
    _recipe_path(values["recipe"], f"'recipe' in {path}")
    _check_profile(values["profile"], f"'profile' in {path}")
    return Params(values["recipe"], values["profile"], tuple(overrides))


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


def run_folder(recipe: str, profile: str, root: Path = ARTIFACTS) -> Path:
    """Where the stages of a recipe lie: `artifacts/RECIPE/PROFILE`, the texts as `params.yaml` has them.

    `dvc.yaml` names the same folders, and no command of it holds one: DVC hands commands to a shell.

    Raises:
        RecipeError: when the recipe is a path with `..` in it, which leads out of the folder, or with `\\${`,
            which DVC writes in another way.
    """
    wrong = "'..' leads out of it" if ".." in Path(recipe).parts else ""
    if "\\${" in recipe:
        wrong = "DVC writes \\${ in another way"
    if wrong:
        raise RecipeError(
            f"The recipe '{_shown(recipe)}' can have no folder below {root}: {wrong}",
            where="recipe",
            fix="give the file another path without that, or name the folders of `vitpipe run` by --in and "
            "--out",
        )
    return Path(f"{root}/{recipe}/{profile}")


def load_recipe(name: str, profile: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and validate one recipe.

    Args:
        name: `paper/recipe` of the package, or the path of a YAML file.
        profile: `full`, `demo`, or another file of `recipes/profiles/`.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        RecipeError: unknown name or profile, bad YAML, or any number of wrong keys and values, all named.
    """
    path = _recipe_path(name, "recipe")
    _check_profile(profile, f"profile of recipe {name}")
    # Later files win: a profile scales every recipe; the family's and the recipe's own correct that.
    values = _read_yaml(path)
    values = merge(values, _read_yaml(PROFILES / f"{profile}.yaml"))
    for scaled in (f"{profile}.yaml", f"{path.stem}.{profile}.yaml"):
        own = path.parent / "profiles" / scaled
        if own.is_file():
            values = merge(values, _read_yaml(own))
    for override in overrides:
        values = merge(values, parse_override(override))
    for key, value in (("name", name), ("profile", profile)):
        values.setdefault(key, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            _all_errors(error),
            where=f"recipe {path.name if path.is_absolute() else path}, profile {profile}",
            fix="correct these keys in the recipe, params.yaml or --set; "
            f"`vitpipe recipe {shlex.quote(name)} --profile {profile}` shows a recipe once it is valid",
        ) from error


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=c` as a nested mapping; the value is read as YAML.

    Raises:
        RecipeError: without an equals sign or with an empty key.
    """
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"The override '{text}' is not of the form section.key=value",
            where="--set or overrides in params.yaml",
            fix="write for example pretrain.epochs=10",
        )
    # YAML, so that numbers, lists, null and true mean the same here as in a recipe file.
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"The value of the override '{text}' is not YAML",
            where="--set or overrides in params.yaml",
            fix="quote text that holds special characters",
        ) from error
    for key in reversed(keys):
        nested = {key: nested}
    return dict(nested)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, mappings key by key."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _recipe_path(name: str, where: str) -> Path:
    """The file of a recipe: one of ours by its name, or an existing file of the user's by its path.

    Raises:
        RecipeError: when there is none, or the text holds characters that do not print.
    """
    _refuse_unprintable(name, "recipe", where)
    if "://" in name:
        raise RecipeError(
            f"The recipe '{_shown(name)}' is an address",
            where=where,
            fix="fetch the file and give its path",
        )
    if Path(name).suffix in (".yaml", ".yml"):
        if not os.path.isfile(name):  # noqa: PTH113  (Path.is_file raises for a name that is too long)
            raise RecipeError(
                f"The recipe file '{_shown(name)}' does not exist", where=where, fix="check the path"
            )
        return Path(name)
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    other = "" if NAME.fullmatch(name) else " (a name has letters, digits and _ - . / only)"
    raise RecipeError(
        f"There is no recipe '{_shown(name)}'{other}{_did_you_mean(name, recipe_names())}",
        where=where,
        fix="`vitpipe recipes` lists them all; a path that ends in .yaml reads your own",
    )


def _check_profile(profile: str, where: str) -> None:
    _refuse_unprintable(profile, "profile", where)
    if profile not in profile_names():
        raise RecipeError(
            f"There is no profile '{_shown(profile)}'{_did_you_mean(profile, profile_names())}",
            where=where,
            fix=f"choose one of: {', '.join(profile_names())}",
        )


def _refuse_unprintable(text: str, kind: str, where: str) -> None:
    if not text.isprintable():
        raise RecipeError(
            f"The {kind} '{_shown(text)}' holds a line break or another character that does not print",
            where=where.replace(text, _shown(text)),
            fix="write letters, digits and _ - . / only; the path of a file of yours may hold spaces, too",
        )


def _shown(text: str) -> str:
    """A text as one short line: what does not print is written as in Python."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in hidden(text))
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError as error:
        raise RecipeError("The file does not exist", where=path, fix="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            "The file cannot be read as text", where=path, fix="check path and rights"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(
            f"The file is not valid YAML: {problem}", where=f"{path}{line}", fix="correct that line"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(
            "The file does not hold keys and values", where=path, fix="write `key: value` lines"
        )
    return values


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    # 0.6 is difflib's default: lower values suggest unrelated keys for short words.
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""


def _all_errors(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        if item["type"] == "is_instance_of":
            continue  # of a class of ours: a text that becomes one is the other choice, and has its own line
        # Pydantic adds which kind it tried, `function-after[Address(), str]`; no key of ours has brackets.
        path = ".".join(str(part) for part in item["loc"] if "[" not in str(part))
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1])
            lines.append(f"'{path}' is not a known key{_did_you_mean(str(item['loc'][-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"'{path}' is missing")
        else:
            shown = "" if item["type"] == "value_error" else f" (given: {item['input']!r})"
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"'{path}': {message}{shown}" if path else message)
    count = f"{len(lines)} mistakes: " if len(lines) > 1 else ""
    return count + "; ".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The field names of the section at a path of validated models."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None:
            continue
        # `Section | None` and `tuple[Section, ...]` hide the model one or two levels down.
        annotation: Any = field.annotation
        inner = [annotation, *get_args(annotation)]
        inner += [arg for item in inner for arg in get_args(item)]
        section = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), section)
    return tuple(section.model_fields)
