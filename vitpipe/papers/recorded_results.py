"""Our own results of the demos, measured over several seeds: what a demo's verdict compares a run with.

They lie beside the published tables, in `papers/demo.yaml` and, for a plugin's recipes, in
`papers/NAME.demo.yaml` of the plugin. Only `vitpipe references` writes them: every number is one of finished
runs. The files may be absent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vitpipe.contracts.discovery import PACKAGE, files_in
from vitpipe.contracts.errors import InputError, some
from vitpipe.contracts.files import write_whole
from vitpipe.contracts.safe_yaml import SAFE_LOADER

# For the identity of stages: the report runs again when they change.
DATA_FILES = ("papers/demo.yaml", "papers/*.demo.yaml")
PROFILE = "demo"
REFERENCE_FILE = PACKAGE / "papers" / "demo.yaml"
# The chains that the README shows, one per paper whose recipes are complete.
RECIPES = ("itpn/pixel_base", "revcolv2/base")
COMMAND = "make references"
_HEADER = (
    "# Written by `vitpipe references`: results of this code over several seeds, by which `vitpipe verdict`\n"
    "# judges a demo. Not for editing: run `make references` where they have to change.\n"
)
# A mean of floats may lie a rounding error outside of their range.
_ROUNDING = 1e-9

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    # Strict: a text that looks like a number is a mistake in a file that no person writes.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ReferenceRow(_Part):
    """One metric of one stage over the seeds; numbers are in `unit`.

    Attributes:
        scale: turns the stage's number into the unit.
        decimals: digits after the point with which its numbers are printed.
        spread: sample standard deviation (n - 1).
    """

    stage: str
    metric: str
    unit: str
    scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    decimals: Annotated[int, Field(ge=0, le=12)]
    mean: Finite
    minimum: Finite
    maximum: Finite
    spread: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _is_ordered(self) -> ReferenceRow:
        slack = _ROUNDING * max(1.0, abs(self.mean))
        if not self.minimum - slack <= self.mean <= self.maximum + slack:
            raise ValueError("the mean lies outside of minimum and maximum")
        return self


class Reference(_Part):
    """The results of one recipe, and what they were measured by.

    Attributes:
        recipe: its name, as in the recipe itself.
        seeds: at which it was run.
        processors: model names, or `unknown`; several where the stages ran on several machines.
        commits: of the code, with `+changes` where it differed from the commit.
        measured_on: the day of the last stage, `YYYY-MM-DD` in UTC, or `unknown`.
        data_digest: of the prepared data that the stages read.
        values: the recipe's sections as they were run, as plain values.
    """

    recipe: str
    profile: str
    seeds: Annotated[tuple[int, ...], Field(min_length=2)]
    processors: Annotated[tuple[str, ...], Field(min_length=1)]
    commits: Annotated[tuple[str, ...], Field(min_length=1)]
    measured_on: Annotated[str, Field(pattern=r"^(\d{4}-\d{2}-\d{2}|unknown)$")]
    data_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rows: Annotated[tuple[ReferenceRow, ...], Field(min_length=1)]
    values: dict[str, Any]

    @model_validator(mode="after")
    def _names_nothing_twice(self) -> Reference:
        for what, names in (("seed", self.seeds), ("row", [(row.stage, row.metric) for row in self.rows])):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"the {what} {twice[0]} stands twice")
        return self

    def row(self, stage: str, metric: str) -> ReferenceRow | None:
        """The row of a metric; None where it was not measured."""
        return next((row for row in self.rows if (row.stage, row.metric) == (stage, metric)), None)


class _File(_Part):
    schema_version: Literal[1]
    references: tuple[Reference, ...]


def reference_files() -> tuple[Path, ...]:
    """The files that exist, of the package and of the plugins."""
    patterns = (pattern.partition("/") for pattern in DATA_FILES)
    return tuple(dict.fromkeys(path for folder, _, name in patterns for path in files_in(folder, name)))


def find_reference(recipe: str, profile: str) -> Reference | None:
    """The recorded results of a recipe at a profile; None where there are none.

    Raises:
        InputError: a file cannot be read, or two of them have results of this recipe.
    """
    found = [
        (path, item)
        for path in reference_files()
        for item in read_references(path)
        if (item.recipe, item.profile) == (recipe, profile)
    ]
    if len(found) > 1:
        raise InputError(
            f"The recipe {recipe} has references in several files",
            where=some([path for path, _ in found]),
            fix="remove all of them but one",
        )
    return found[0][1] if found else None


def read_references(path: Path) -> tuple[Reference, ...]:
    """The recorded results in one file; none in a file that is absent or empty.

    Raises:
        InputError: the file cannot be read, is not YAML or has other keys or values; names all mistakes.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=SAFE_LOADER)
        if values is None:
            return ()
        if not isinstance(values, dict) or "references" not in values:
            raise _refused("The file holds something else than references", path)
        # By JSON, in which a list may be a tuple even where numbers are strict.
        file = _File.model_validate_json(json.dumps(values, default=str))
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        wrong = [f"'{'.'.join(map(str, item['loc']))}': {item['msg']}" for item in error.errors()]
        raise _refused(
            f"The references have other keys or values than vitpipe writes ({some(wrong)})", path
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise _refused(f"The references are not valid YAML: {problem}", path, line) from error
    except (OSError, ValueError, TypeError) as error:
        raise _refused(f"The references cannot be read ({error})", path) from error
    twice = [
        name for name, count in Counter((r.recipe, r.profile) for r in file.references).items() if count > 1
    ]
    if twice:
        raise _refused(f"The references of {twice[0][0]} at profile {twice[0][1]} stand twice", path)
    return file.references


def _refused(what: str, path: Path, line: str = "") -> InputError:
    # A file that somebody names may be their own: no advice that destroys it.
    fix = "choose another file with --out, or restore this one if it was written by `vitpipe references`"
    if path == REFERENCE_FILE:
        fix = f"restore the file with git, or remove it and run `{COMMAND}`"
    return InputError(what, where=f"{path}{line}", fix=fix)


def write_references(path: Path, new: Sequence[Reference]) -> None:
    """Put results into a file; those of other recipes stay as they are.

    Raises:
        InputError: there is a file that holds something else; it is not touched.
        StorageError: when the disk refuses.
    """
    replaced = {(item.recipe, item.profile) for item in new}
    kept = [item for item in read_references(path) if (item.recipe, item.profile) not in replaced]
    every = sorted([*kept, *new], key=lambda item: (item.recipe, item.profile))
    values = _File(schema_version=1, references=tuple(every)).model_dump(mode="json")
    # None: flow style for what holds no other collection, so that a row is a line.
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _HEADER + text)
