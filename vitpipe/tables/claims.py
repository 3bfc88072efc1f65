"""The rows of a published table, and the recipes that claim them by their `expect`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitpipe.config.read import check_profile, load_recipe, read_mapping, recipe_files, variant_names
from vitpipe.config.recipe import Expectation, Recipe
from vitpipe.contracts.errors import InputError
from vitpipe.papers.published import find_row, rows, tables
from vitpipe.papers.published import table as published_table


@dataclass(frozen=True)
class Claim:
    """One recipe or variant that claims a row, with the number that it compares.

    Attributes:
        name: as the command line takes it; a file may give its recipe another one.
    """

    name: str
    recipe: Recipe
    expectation: Expectation


@dataclass(frozen=True)
class TableRow:
    """One published row and all that claim it; the same number may be claimed by several recipes."""

    published: Mapping[str, Any]
    claims: tuple[Claim, ...]


def claimed_rows(
    paper: str, number: str, profile: str, overrides: Sequence[str] = ()
) -> tuple[TableRow, ...]:
    """All rows of a table in its order, each with the recipes and variants that claim it.

    Of a table that holds settings and no results: the rows of other tables whose recipes name it in
    `Expectation.settings`, each with those of its recipes that do.

    Args:
        paper, number: as `vitpipe table PAPER/NUMBER` has them.
        overrides: of every recipe, `section.key=value`.

    Raises:
        RecipeError: there is no such table or profile, or a recipe of the paper cannot be used.
        InputError: no recipe claims a row of this table.
    """
    published_table(paper, number)  # refuses an unknown table with its list of choices
    check_profile(profile, "--profile")
    claims: list[tuple[dict[str, Any], Claim]] = []
    for name, recipe in _recipes_of(paper, profile, overrides).items():
        claims += [(find_row(paper, item.where), Claim(name, recipe, item)) for item in recipe.expect]
    found = tuple(
        TableRow(row, tuple(claim for claimed, claim in claims if claimed == row))
        for row in rows(paper)
        if row["table"] == number
    )
    if not any(row.claims for row in found):
        # A table of settings: its numbers stand in other tables.
        named = [(row, claim) for row, claim in claims if number in claim.expectation.settings]
        found = tuple(
            TableRow(row, tuple(claim for claimed, claim in named if claimed == row))
            for row in rows(paper)
            if any(claimed == row for claimed, _ in named)
        )
    if not any(row.claims for row in found):
        others = [name for name in tables(paper) if name in {claimed["table"] for claimed, _ in claims}]
        raise InputError(
            f"No recipe claims a row of {paper}/{number}, so there is nothing to run",
            where="PAPER/NUMBER",
            fix="write a recipe whose `expect` selects its rows"
            + (f", or run one of: {', '.join(f'{paper}/{name}' for name in others)}" if others else ""),
        )
    return found


def select_rows(
    table: Sequence[TableRow], conditions: Sequence[str], where: str = "--row"
) -> tuple[TableRow, ...]:
    """The rows that fulfil all conditions `KEY=VALUE` on their keys; all rows without conditions.

    Raises:
        InputError: a condition is not of that form, names no key of the rows, or no row is left.
    """
    selected = tuple(table)
    for condition in conditions:
        key, equals, value = condition.partition("=")
        keys = {name for row in table for name in row.published}
        if not equals or key not in keys:
            raise InputError(
                f"'{condition}' is not of the form KEY=VALUE with a key of the rows",
                where=where,
                fix=f"use one of the keys {', '.join(sorted(keys))}, for example variant=NAME",
            )
        selected = tuple(row for row in selected if str(row.published.get(key)) == value)
        if not selected:
            given = dict.fromkeys(str(row.published.get(key)) for row in table)
            raise InputError(
                f"No row is left by '{condition}'", where=where, fix=f"{key} is one of: {', '.join(given)}"
            )
    return selected


def _recipes_of(paper: str, profile: str, overrides: Collection[str]) -> dict[str, Recipe]:
    """All recipes and variants of a paper by their names."""
    found: dict[str, Recipe] = {}
    for file, path in recipe_files().items():
        # From the file itself: another paper's recipe need not be valid at this profile, which may be one of
        # the user's.
        source = read_mapping(path).get("source")
        if not isinstance(source, Mapping) or source.get("paper") != paper:
            continue
        found |= {name: load_recipe(name, profile, tuple(overrides)) for name in variant_names(file)}
    return found
