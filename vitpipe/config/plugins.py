"""The key `plugins` of params.yaml: folders with the user's own methods, networks, datasets and recipes.

Read before anything else, because the types of recipes are made from the methods and networks that there are.
Hence this module imports nothing of the recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitpipe.contracts.discovery import use_plugins
from vitpipe.contracts.errors import RecipeError


def use_plugins_of(params: Path) -> None:
    """Use the plugins that a params file names; their paths are relative to its folder.

    A file that is missing or no YAML names none: the verbs that need it say what is wrong with it.

    Raises:
        RecipeError: when `plugins` is not a list of texts.
        InputError: as `use_plugins`.
    """
    folders = _read(params).get("plugins") or []
    if not isinstance(folders, list) or not all(isinstance(item, str) for item in folders):
        raise RecipeError(
            "'plugins' must be a list of folders", where=params, fix="write for example plugins: [my_methods]"
        )
    use_plugins([params.parent / folder for folder in folders], where=f"plugins in {params}")


def params_of(arguments: Sequence[str]) -> Path:
    """The params file that a command line names by --params; `params.yaml` by default."""
    # Before the command line is parsed: its verbs import the recipe.
    for place, argument in enumerate(arguments):
        if argument == "--params" and place + 1 < len(arguments):
            return Path(arguments[place + 1])
        if argument.startswith("--params="):
            return Path(argument.partition("=")[2])
    return Path("params.yaml")


def _read(params: Path) -> dict[str, Any]:
    # Most commands outside of a project find no such file, and need not pay for importing yaml.
    if not params.is_file():
        return {}
    import yaml

    from vitpipe.config.yaml_core import read_yaml

    try:
        values = read_yaml(params.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
