"""The verb `recipes`: the recipe files, or all variants of one."""

from __future__ import annotations

from typing import Annotated

import typer

from vitpipe.verbs.completion import complete_recipe_file
from vitpipe.verbs.options import JsonOption
from vitpipe.verbs.show import print_rows


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="recipes")(recipes)


def recipes(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[PAPER/FILE]",
            help="list all variants of this recipe file",
            autocompletion=complete_recipe_file,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipe files with their number of variants; with PAPER/FILE all variants of one."""
    from vitpipe.config.read import load_recipe, recipe_files, variant_names

    if file is not None:
        # full: what the paper did; demo changes networks and data.
        found = [load_recipe(name, "full") for name in variant_names(file)]
        print_rows(
            [{"recipe": r.name, "model": r.model.name, "summary": r.summary} for r in found], as_json, file
        )
        return
    rows = []
    for name in recipe_files():
        names = variant_names(name)
        first = load_recipe(names[0], "full")
        is_alone = names == (name,)
        rows.append(
            {
                "recipe": name,
                "variants": "" if is_alone else len(names),
                "model": first.model.name if is_alone else "",
                "paper": first.source.title,
                "summary": first.summary,
            }
        )
    print_rows(rows, as_json, right=("variants",))
