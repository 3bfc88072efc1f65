"""From YAML and overrides to one validated recipe; every mistake is reported at once.

Order of precedence, later wins: recipe file, the choices of its variant (`variants.py`),
`recipes/profiles/<profile>.yaml`, the paper's `recipes/<paper>/profiles/<profile>.yaml`, the recipe's own
`.../profiles/<recipe>.<profile>.yaml`, keys and overrides of params.yaml, `--set` on the command line.
Mappings are merged key by key; anything else is replaced.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vitpipe.config.mistakes import all_mistakes, remedy
from vitpipe.config.places import Places, place_of
from vitpipe.config.recipe import Recipe
from vitpipe.config.variants import merge, variants_of, with_choices
from vitpipe.config.yaml_core import read_yaml, yaml_problem
from vitpipe.contracts.discovery import files_in
from vitpipe.contracts.errors import RecipeError, shortened
from vitpipe.contracts.files import read_text
from vitpipe.contracts.spelling import did_you_mean

_PROFILES = "profiles"
ARTIFACTS = Path("artifacts")
# The names of recipes and profiles; they become folders, MLflow parameters and arguments of commands.
NAME = re.compile(r"[A-Za-z0-9_\-./]+")


def recipe_files() -> dict[str, Path]:
    """Name -> file of all recipes of the package and of the plugins, for example `itpn/pixel_base`."""
    return dict(_named(files_in("recipes", "*/*.yaml")))


@functools.lru_cache(maxsize=8)  # asked for several times by each reading of a recipe
def _named(files: tuple[Path, ...]) -> dict[str, Path]:
    found = (path for path in files if path.parent.name != _PROFILES)
    return {f"{path.parent.name}/{path.stem}": path for path in found}


def recipe_names() -> tuple[str, ...]:
    """Names of everything that can be run: recipe files without variants, and all variants of the others.

    Raises:
        RecipeError: when a file is not YAML, or its `variants` cannot be used.
    """
    return tuple(name for file in recipe_files() for name in variant_names(file))


def variant_names(file: str) -> tuple[str, ...]:
    """The names that one recipe file can be run by: its own, or with variants one per combination.

    Args:
        file: as `recipe_files` names it, or the path of a YAML file.

    Raises:
        RecipeError: as `recipe_names`, or when there is no such file.
    """
    path, _ = recipe_path(file, "recipe")
    variants = variants_of(read_mapping(path), path)
    if variants is None:
        return (file,)
    return tuple("/".join((file, *combination)) for combination in variants.combinations)


def profile_names() -> tuple[str, ...]:
    """Names of all profiles."""
    return tuple(sorted(_profile_files()))


def _profile_files() -> dict[str, Path]:
    return {path.stem: path for path in files_in(f"recipes/{_PROFILES}", "*.yaml")}


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
            f"The recipe '{shortened(recipe)}' can have no folder below {root}: {wrong}",
            where="recipe",
            fix="give the file another path without that, or name the folders of `vitpipe run` by --in and "
            "--out",
        )
    return Path(f"{root}/{recipe}/{profile}")


def load_recipe(name: str, profile: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and validate one recipe.

    Args:
        name: `paper/recipe` of the package or a plugin, or the path of a YAML file; of a file with variants
            followed by one choice per axis, `paper/recipe/choice/choice`.
        profile: `full`, `demo`, or another file of `recipes/profiles/`.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        RecipeError: unknown name or profile, bad YAML, or any number of wrong keys and values, all named.
    """
    path, _ = recipe_path(name, "recipe")
    shown = str(path.name if path.is_absolute() else path)
    return recipe_of(recipe_values(name, profile), overrides, name, profile, shown)


def recipe_of(
    values: Mapping[str, Any], overrides: Sequence[str], name: str, profile: str, shown: str
) -> Recipe:
    """Lay overrides over a recipe's values and validate it.

    Args:
        values: as `recipe_values`.
        name, profile: by which the values were read.
        shown: what messages call the recipe.

    Raises:
        RecipeError: any number of wrong keys and values, all named.
    """
    values, places = dict(values), Places(f"recipe {shown}, profile {profile}")
    for override in overrides:
        change, place = parse_override(override), place_of(override)
        if wrong := [key for key in ("name", "profile") if key in change]:
            raise RecipeError(
                f"'{shortened(override)}' is no value of a recipe: its {wrong[0]} is chosen beside them",
                where=place,
                fix="use --recipe and --profile, or the keys recipe and profile of params.yaml",
            )
        values = merge(values, change)
        places.add(override, place)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        what, where = all_mistakes(error, values, places)
        raise RecipeError(
            what,
            where=where,
            fix=f"{remedy(error, values)}correct these keys there; "
            f"`vitpipe recipe {shlex.quote(name)} --profile {profile}` shows a recipe once it is valid",
        ) from error


def recipe_values(name: str, profile: str) -> dict[str, Any]:
    """The values of a recipe before overrides and validation: file, variant and profiles merged.

    Raises:
        RecipeError: as `load_recipe`.
    """
    path, choices = recipe_path(name, "recipe")
    check_profile(profile, f"profile of recipe {name}")
    # Later files win: a profile scales every recipe; the family's and the recipe's own correct that.
    values = with_choices(read_mapping(path), choices, name.removesuffix("/".join(("", *choices))), path)
    values = merge(values, read_mapping(_profile_files()[profile]))
    for own in _own_profiles(path, profile):
        values = merge(values, read_mapping(own))
    _check_own_name(values, path, profile)
    return {"name": name, "profile": profile} | values


def _check_own_name(values: Mapping[str, Any], path: Path, profile: str) -> None:
    """Refuse a file that calls itself as another recipe, or is written for another profile.

    Raises:
        RecipeError: its results would be shown under a name that is not theirs.
    """
    file = recipe_files().get("/".join(str(values.get("name", "")).split("/")[:2]))
    problem = ""
    if file is not None and file.resolve() != path.resolve():
        problem = f"'name' is '{values['name']}', which is another recipe"
    elif values.get("profile", profile) != profile:
        problem = f"'profile' is '{shortened(values['profile'])}', and the run's is '{profile}'"
    if problem:
        raise RecipeError(problem, where=path, fix="take that line out of the file")


def _own_profiles(path: Path, profile: str) -> list[Path]:
    """The profile files of a recipe's paper and of the recipe itself, as far as there are any."""
    found = []
    for scaled in (f"{profile}.yaml", f"{path.stem}.{profile}.yaml"):
        beside = path.parent / _PROFILES / scaled
        if beside.is_file():
            found.append(beside)
        elif path in recipe_files().values():
            # A plugin's recipe of a paper that we have is scaled as the others of that paper.
            found += files_in(f"recipes/{path.parent.name}/{_PROFILES}", scaled)
    return found


def parse_override(text: str, where: str = "") -> dict[str, Any]:
    """`a.b=c` as a nested mapping; the value is read as YAML.

    Args:
        where: where the text comes from, for messages; by default `place_of` it.

    Raises:
        RecipeError: without an equals sign or with an empty key.
    """
    where = where or place_of(text)
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"The override '{shortened(text)}' is not of the form section.key=value",
            where=where,
            fix="write for example pretrain.epochs=10",
        )
    # YAML, so that numbers, lists, null and true mean the same here as in a recipe file.
    try:
        nested: Any = read_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"The value of the override '{shortened(text)}' is not YAML: {yaml_problem(error)[0]}",
            where=where,
            fix="correct the value, or put a text that holds special characters into quotes",
        ) from error
    for key in reversed(keys):
        nested = {key: nested}
    return dict(nested)


def recipe_path(name: str, where: str) -> tuple[Path, tuple[str, ...]]:
    """The file of a recipe, one of ours by its name or one of the user's by its path, and what follows it.

    Raises:
        RecipeError: when there is none, or the text holds characters that do not print.
    """
    _refuse_unprintable(name, "recipe", where)
    if "://" in name:
        raise RecipeError(
            f"The recipe '{shortened(name)}' is an address",
            where=where,
            fix="fetch the file and give its path",
        )
    parts = name.split("/")
    for i in range(1, len(parts) + 1):
        path = "/".join(parts[:i])
        # Path.is_file raises for a name that is too long, os.path does not. What is there and no regular
        # file, such as a named pipe, is refused by name when it is read.
        is_there = os.path.exists(path) and not os.path.isdir(path)  # noqa: PTH110, PTH112
        if Path(path).suffix in (".yaml", ".yml") and is_there:
            return Path(path), tuple(parts[i:])
    if Path(name).suffix in (".yaml", ".yml") and os.path.isdir(name):  # noqa: PTH112
        raise RecipeError(f"The recipe '{shortened(name)}' is a folder", where=where, fix="give a file in it")
    if any(Path(part).suffix in (".yaml", ".yml") for part in parts):
        raise RecipeError(
            f"The recipe file '{shortened(name)}' does not exist", where=where, fix="check the path"
        )
    files = recipe_files()
    if (file := "/".join(parts[:2])) in files:
        return files[file], tuple(parts[2:])
    other = "" if NAME.fullmatch(name) else " (a name has letters, digits and _ - . / only)"
    raise RecipeError(
        f"There is no recipe '{shortened(name)}'{other}{did_you_mean(name, list(files))}",
        where=where,
        fix="`vitpipe recipes` lists them all; a path that ends in .yaml reads your own",
    )


def check_profile(profile: str, where: str) -> None:
    """Refuse a profile that does not exist.

    Args:
        where: what names it, for the message.

    Raises:
        RecipeError: with the nearest name.
    """
    _refuse_unprintable(profile, "profile", where)
    if profile not in profile_names():
        raise RecipeError(
            f"There is no profile '{shortened(profile)}'{did_you_mean(profile, profile_names())}",
            where=where,
            fix=f"choose one of: {', '.join(profile_names())}",
        )


def _refuse_unprintable(text: str, kind: str, where: str) -> None:
    if not text.isprintable():
        raise RecipeError(
            f"The {kind} '{shortened(text)}' holds a line break or another character that does not print",
            where=where.replace(text, shortened(text)),
            fix="write letters, digits and _ - . / only; the path of a file of yours may hold spaces, too",
        )


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    # Kept by content: a table reads one file and one profile for each of a hundred variants, 10 ms a time.
    # Nobody changes what is returned: `merge` copies.
    return read_yaml(text)


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; none of an empty one.

    Raises:
        RecipeError: when it is missing, unreadable, not YAML or no mapping.
    """
    try:
        values = _parsed(read_text(path))
    except FileNotFoundError as error:
        raise RecipeError("The file does not exist", where=path, fix="check the path") from error
    except OSError as error:
        raise RecipeError(
            f"The file cannot be read ({error.strerror})",
            where=path,
            fix="give a YAML file that you may read",
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The file is not text in UTF-8 (byte {error.start})",
            where=path,
            fix="give a YAML file, or save this one as UTF-8",
        ) from error
    except yaml.YAMLError as error:
        problem, line = yaml_problem(error)
        raise RecipeError(
            f"The file is not valid YAML: {problem}",
            where=f"{path}, line {line}" if line else path,
            fix="correct that line",
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(
            "The file does not hold keys and values", where=path, fix="write `key: value` lines"
        )
    return values
