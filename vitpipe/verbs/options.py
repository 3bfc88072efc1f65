"""Options that several verbs have, in one wording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitpipe.verbs.completion import complete_profile, complete_recipe

if TYPE_CHECKING:
    from vitpipe.config.params_file import Params

# A recipe without a profile runs at laptop size: the full one would start days of training.
_PROFILE = "demo"

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="recipe name or a path ending in .yaml  [default: that of params.yaml]",
        autocompletion=complete_recipe,
    ),
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="demo, full, ...", autocompletion=complete_profile)
]
# Of verbs that compiled packages call: nothing is looked up in params.yaml.
FixedRecipeOption = Annotated[str, typer.Option("--recipe", help="recipe name or a path ending in .yaml")]
FixedProfileOption = Annotated[str, typer.Option("--profile", help="demo, full, ...")]
ExecutorInputOption = Annotated[str, typer.Option(help="Kubeflow's executor input, JSON")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, may be repeated")]
ParamsOption = Annotated[Path, typer.Option("--params", help="file with recipe, profile and what is changed")]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def chosen_recipe(
    recipe: str | None, profile: str | None, overrides: list[str] | None, params: Path
) -> Params:
    """Recipe, profile and overrides of the command line, else of params.yaml.

    Raises:
        InputError: as `config.params_file.choose`.
    """
    from vitpipe.config.params_file import choose

    return choose(recipe, profile, overrides or (), params, default_profile=_PROFILE)
