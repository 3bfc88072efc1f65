"""Options that several verbs have, in one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitpipe.verbs.completion import complete_profile, complete_recipe

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
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, may be repeated")]
ParamsOption = Annotated[Path, typer.Option("--params", help="file with recipe, profile and what is changed")]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output")]
