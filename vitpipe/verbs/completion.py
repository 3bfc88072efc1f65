"""Names that a shell completes: recipes, profiles, stages, networks, datasets, published tables.

Every function takes what was typed so far, needs no torch, and never fails: a shell shows no errors.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress

_VARIABLE = "_VITPIPE_COMPLETE"  # set by the scripts of `vitpipe --show-completion`


def _completion(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        # A damaged recipe, a plugin that cannot be imported: nothing is offered then.
        with suppress(Exception):
            return [name for name in names() if name.startswith(incomplete)]
        return []

    return complete


def typed_so_far() -> list[str] | None:
    """The command line that a shell wants completed; None when this process is no completion."""
    if _VARIABLE not in os.environ:
        return None
    # As typer's scripts for bash, and for zsh and fish, give it.
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    try:
        return shlex.split(line)[1:]
    except ValueError:  # a quote that is still open
        return line.split()[1:]


def _recipes() -> Iterable[str]:
    from vitpipe.config.read import recipe_names

    return recipe_names()  # where none fits, shells offer files: a recipe may be the path of one


def _recipe_files() -> Iterable[str]:
    from vitpipe.config.read import recipe_files

    return recipe_files()


def _profiles() -> Iterable[str]:
    from vitpipe.config.read import profile_names

    return profile_names()


def _stages() -> Iterable[str]:
    from vitpipe.contracts.graph import all_stages

    return all_stages()


def _models() -> Iterable[str]:
    from vitpipe.config.model import entries

    return entries()


def _datasets() -> Iterable[str]:
    from vitpipe.config.set_names import facts_files

    return facts_files()


def _tables() -> Iterable[str]:
    from vitpipe.papers.published import papers, tables

    return [f"{paper}/{number}" for paper in papers() for number in tables(paper)]


complete_recipe = _completion(_recipes)
complete_recipe_file = _completion(_recipe_files)
complete_profile = _completion(_profiles)
complete_stage = _completion(_stages)
complete_model = _completion(_models)
complete_dataset = _completion(_datasets)
complete_table = _completion(_tables)
