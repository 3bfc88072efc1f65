"""Read the published tables: one row per published value, selected by equality on its keys.

Every row has the keys table, method, variant, dataset, metric, value, unit, setting, source, and sometimes
flag (a remark). `table` is the short name of the source: `11` is table 11 of the supplement, `main-3` is
table 3 of the main paper.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vitpipe.contracts.discovery import files_in
from vitpipe.contracts.errors import RecipeError
from vitpipe.contracts.safe_yaml import SAFE_LOADER
from vitpipe.contracts.spelling import did_you_mean

if TYPE_CHECKING:
    from vitpipe.config.recipe import Recipe

# For the identity of stages (config/code_identity.py): only the recipe's own paper counts.
DATA_FILES = ("papers/{paper}.yaml",)
NUM_NEAR_MISSES = 3
_SHOWN = ("method", "variant", "dataset", "metric", "value", "unit", "setting", "source", "flag")


def papers() -> tuple[str, ...]:
    """Names of the papers that have tables, ours and the plugins'."""
    return tuple(sorted(_files()))


def _files() -> dict[str, Path]:
    # `demo.yaml` and `NAME.demo.yaml` hold results of ours (recorded_results.py).
    found = (path for path in files_in("papers", "*.yaml") if path.stem.rpartition(".")[2] != "demo")
    return {path.stem: path for path in found}


def rows(paper: str) -> list[dict[str, Any]]:
    """All rows of a paper, in the order of its tables.

    Raises:
        RecipeError: when there is no such paper.
    """
    if paper not in papers():
        raise RecipeError(
            f"There are no published tables of the paper '{paper}'{did_you_mean(paper, papers())}",
            where="source.paper of the recipe, or PAPER in PAPER/NUMBER",
            fix=f"choose one of: {', '.join(papers())}",
        )
    # Copies: `_read` is cached, and a caller that changes a row would change it for all others.
    return [dict(row) for row in _read(_files()[paper])]


def find_row(paper: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """The one row whose values equal those of `where`.

    Args:
        where: key -> value, any subset of the keys of a row.

    Raises:
        RecipeError: when no row or several rows match; names the nearest rows and their differences.
    """
    every = rows(paper)
    found = [row for row in every if all(row.get(key) == value for key, value in where.items())]
    if len(found) == 1:
        return found[0]
    if found:
        what = f"{len(found)} published rows of {paper} match {_text(where)}: {_distinctions(found, where)}"
        fix = "add one of these keys to `where`, so that exactly one row matches"
    else:
        nearest = sorted(every, key=lambda row: _closeness(row, where), reverse=True)[:NUM_NEAR_MISSES]
        what = f"No published row of {paper} matches {_text(where)}; the nearest: " + "; ".join(
            f"({i}) {_difference(row, where)}" for i, row in enumerate(nearest, 1)
        )
        fix = f"correct `where`; `vitpipe table {paper}/{nearest[0]['table']}` lists the rows of that table"
    raise RecipeError(what, where=f"expect of a recipe of paper {paper}", fix=fix)


def check_expected(recipe: Recipe) -> None:
    """Check that each row of a recipe's `expect` is there: before its training, not in the report.

    Raises:
        RecipeError: as `find_row`.
    """
    for item in recipe.expect:
        find_row(recipe.source.paper, item.where)


def tables(paper: str) -> dict[str, str]:
    """Short name -> full source of every table of a paper.

    Raises:
        RecipeError: when there is no such paper.
    """
    # Reversed, because a later entry of a dict replaces an earlier one: the source of a table's first row
    # counts.
    return {row["table"]: row["source"] for row in reversed(rows(paper))}


def table(paper: str, number: str) -> list[dict[str, Any]]:
    """The rows of one table, all with the same keys, for `vitpipe table PAPER/NUMBER`.

    Raises:
        RecipeError: when there is no such paper or table.
    """
    found = [row for row in rows(paper) if row["table"] == number]
    if not found:
        raise RecipeError(
            f"There is no table '{number}' of {paper}{did_you_mean(number, list(tables(paper)))}"
            if number
            else f"The number of the table of {paper} is missing",
            where="PAPER/NUMBER",
            fix="choose one of: "
            + ", ".join(f"{paper}/{name}" for name in sorted(tables(paper), key=_order)),
        )
    # Keys without a value in every row are omitted, mostly `flag`.
    keys = [key for key in _SHOWN if any(row.get(key) is not None for row in found)]
    return [{key: row.get(key) for key in keys} for row in found]


@functools.cache
def _read(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(yaml.load(path.read_text(encoding="utf-8"), Loader=SAFE_LOADER))


def _order(name: str) -> tuple[bool, int, str]:
    # Sort key: 2 before 11, names such as main-3 after the numbers.
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def _closeness(row: Mapping[str, Any], where: Mapping[str, Any]) -> float:
    # Similarity of the texts, 0 to 1 per key, and 1 more for equality: an equal key outweighs a similar one.
    return sum(
        difflib.SequenceMatcher(None, str(row.get(key, "")), str(value)).ratio() + (row.get(key) == value)
        for key, value in where.items()
    )


def _text(where: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in where.items()) + "}"


def _difference(row: Mapping[str, Any], where: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} '{row[key]}' instead of '{value}'" if key in row else f"has no key '{key}'"
        for key, value in where.items()
        if row.get(key) != value
    )


def _distinctions(found: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> str:
    # Not `value`: a recipe that selects a row by the value would hide a correction of the table.
    free = [key for key in ("table", *_SHOWN) if key not in where and key != "value"]
    parts = []
    for key in free:
        values = list(dict.fromkeys(str(row.get(key, "")) for row in found))
        if len(values) > 1:
            shown = ", ".join(f"'{value}'" for value in values[:NUM_NEAR_MISSES])
            parts.append(f"{key} is {shown}{' and others' if len(values) > NUM_NEAR_MISSES else ''}")
    return "; ".join(parts)
