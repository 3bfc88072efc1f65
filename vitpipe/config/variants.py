"""Variants of one recipe file: a table's cells (backbone x dataset x loss) as choices instead of files.

    variants:
      backbone:
        swin_tiny: {label: Swin-T, model: {name: swin_tiny}}
        cvt_13: {label: CvT-13, model: {name: cvt_13}}
      loss:
        baseline: {label: ""}
        drloc: {label: " + drloc", finetune: {method: {name: drloc}}}
      except:
        - {backbone: cvt_13, loss: drloc}
    expect:
      - {stage: finetune, metric: top1, where: {table: '6', variant: "${backbone}${loss}"}, tolerance: 0.3}

The variant `PAPER/FILE/swin_tiny/drloc` is the file with the values of these choices laid over it, one
choice per axis in the order of the axes. A reference `${backbone}` is the label of the axis' choice,
`${model.name}` a value of the recipe. A row with `when: {loss: drloc}` is claimed by those variants only.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpipe.config.named import NAMED_KEYS, overlaid
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import RecipeError, some
from vitpipe.contracts.spelling import did_you_mean

KEY = "variants"
_ONLY, _EXCEPT, _LABEL, _WHEN = "only", "except", "label", "when"
# A choice is one folder of the recipe's output path and one part of its name: no slash, and no dot, by which
# a path of a YAML file is recognised.
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


@dataclass(frozen=True)
class Choice:
    """One choice of an axis: what a published table calls it, and the recipe values that it sets."""

    label: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Variants:
    """The axes of a recipe file.

    Attributes:
        axes: axis -> choice -> what it sets, in the order of the file.
        combinations: one choice per axis each; those that `only` and `except` leave.
    """

    axes: Mapping[str, Mapping[str, Choice]]
    combinations: tuple[tuple[str, ...], ...]


def variants_of(values: Mapping[str, Any], where: str | Path) -> Variants | None:
    """The variants of a recipe file's values; None for a file without `variants`.

    Raises:
        RecipeError: names all mistakes of the block.
    """
    if KEY not in values:
        return None
    block = values[KEY] if isinstance(values[KEY], Mapping) else {}
    wrong: list[str] = []
    axes = {
        str(axis): _choices(str(axis), choices, wrong)
        for axis, choices in block.items()
        if axis not in (_ONLY, _EXCEPT)
    }
    if not axes:
        wrong.append("it needs at least one axis with named choices")
    only, without = (
        list(_entries(key, block.get(key), axes, wrong)) if key in block else None for key in (_ONLY, _EXCEPT)
    )
    kept = [
        combination
        for combination in itertools.product(*axes.values())
        if (only is None or any(_fits(entry, axes, combination) for entry in only))
        and not any(_fits(entry, axes, combination) for entry in without or ())
    ]
    if not kept and not wrong:
        wrong.append("`only` and `except` leave no combination")
    if wrong:
        raise RecipeError(
            "The block `variants` cannot be used: " + "; ".join(wrong),
            where=where,
            fix="write axis: {choice: {section: {key: value}}}; `only`, `except`: lists of {axis: choice}",
        )
    return Variants(axes, tuple(kept))


def with_choices(
    values: Mapping[str, Any], chosen: Sequence[str], name: str, where: str | Path
) -> dict[str, Any]:
    """A recipe file's values as those of one variant: choices laid over them, references filled in.

    References see the file and the choices only. Profile and overrides come later: the row that a recipe
    claims is the same at demo size.

    Args:
        chosen: one choice per axis; empty for a file without variants.
        name: the file's name as the command line takes it, for messages.

    Raises:
        RecipeError: a choice is missing, unknown or one too many, or a reference leads nowhere.
    """
    variants = variants_of(values, where)
    plain: dict[str, Any] = {key: value for key, value in values.items() if key != KEY}
    labels: dict[str, str] = {}
    if variants is None and chosen:
        raise RecipeError(
            f"The recipe {name} has no variants, so '{'/'.join(chosen)}' means nothing",
            where="recipe",
            fix=f"write {name}",
        )
    if variants is not None:
        _check(variants, chosen, name)
        for (axis, choices), word in zip(variants.axes.items(), chosen, strict=True):
            plain = merge(plain, choices[word].values)
            labels[axis] = choices[word].label
    wrong: list[str] = []
    axes = variants.axes if variants else {}
    plain = _with_references(plain, labels, lambda entry: _fits(entry, axes, chosen), axes, wrong)
    if wrong:
        raise RecipeError(
            "; ".join(wrong),
            where=where,
            fix="refer to an axis of `variants`, or to a value that stands in this file, for example "
            "${model.name}",
        )
    return plain


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, mappings key by key; settings of another method or head go."""
    merged = dict(base)
    for key, value in change.items():
        old, new = merged.get(key), value
        if key in NAMED_KEYS and old is not None:
            old, new = overlaid(old, new)
        merged[key] = merge(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new
    return merged


def _choices(axis: str, block: Any, wrong: list[str]) -> dict[str, Choice]:
    if axis in Recipe.model_fields or not _NAME.fullmatch(axis):
        # `${data}` would mean either.
        wrong.append(
            f"'{axis}' cannot be the name of an axis (a key of the recipe, or other than A-Z 0-9 _ -)"
        )
    if not isinstance(block, Mapping) or not block:
        wrong.append(f"axis '{axis}' has no named choices")
        return {}
    found = {}
    for name, values in block.items():
        # YAML 1.1 reads on, off and no as booleans, which are then no text that anybody wrote.
        if isinstance(name, bool) or not _NAME.fullmatch(str(name)):
            wrong.append(
                f"'{name}' of axis '{axis}' cannot be the name of a choice (letters, digits, _ and -)"
            )
            continue
        if values is not None and not isinstance(values, Mapping):
            wrong.append(f"choice '{name}' of axis '{axis}' does not hold keys and values")
            continue
        rest = dict(values or {})
        label = rest.get(_LABEL, name)
        if isinstance(label, bool) or not isinstance(label, str | int | float):
            wrong.append(f"the label of choice '{name}' of axis '{axis}' is no text")
            continue
        found[str(name)] = Choice(str(rest.pop(_LABEL, name)), rest)
    return found


def _entries(
    key: str, block: Any, axes: Mapping[str, Mapping[str, Choice]], wrong: list[str]
) -> Iterator[dict[str, tuple[str, ...]]]:
    """Entries of `only`, `except` or `when`: axis -> the choices that fit."""
    for entry in block if isinstance(block, list) else [block]:
        if not isinstance(entry, Mapping) or not entry:
            wrong.append(f"`{key}` does not hold {{axis: choice}}")
            continue
        read = {
            str(axis): tuple(str(word) for word in (words if isinstance(words, list) else [words]))
            for axis, words in entry.items()
        }
        for axis, words in read.items():
            if axis not in axes:
                wrong.append(f"`{key}`: '{axis}' is not an axis{did_you_mean(axis, list(axes))}")
                continue
            wrong += [
                f"`{key}`: '{word}' is not a choice of {axis}{did_you_mean(word, list(axes[axis]))}"
                for word in words
                if word not in axes[axis]
            ]
        yield read


def _fits(entry: Mapping[str, Sequence[str]], axes: Mapping[str, Any], combination: Sequence[str]) -> bool:
    return all(word in entry.get(axis, (word,)) for axis, word in zip(axes, combination, strict=True))


def _check(variants: Variants, chosen: Sequence[str], name: str) -> None:
    """Raise RecipeError unless `chosen` is one of the combinations."""
    if tuple(chosen) in variants.combinations:
        return
    example = "/".join((name, *variants.combinations[0]))
    shown = "; ".join(f"{axis}: {some(list(choices))}" for axis, choices in variants.axes.items())
    what = f"The recipe {name} has variants; its name needs one choice per axis ({shown})"
    if len(chosen) == len(variants.axes):
        unknown = [
            f"'{word}' is not a choice of {axis}{did_you_mean(word, list(choices))}"
            for (axis, choices), word in zip(variants.axes.items(), chosen, strict=True)
            if word not in choices
        ]
        what = f"The recipe {name} has no variant {'/'.join(chosen)}"
        # Each choice may exist and the combination not: tables have holes.
        what += f": {'; '.join(unknown)}" if unknown else ", its `variants` leave this combination out"
    raise RecipeError(
        what,
        where="recipe",
        fix=f"write for example {example}; `vitpipe recipes {shlex.quote(name)}` lists all of them",
    )


def _with_references(
    values: dict[str, Any],
    labels: Mapping[str, str],
    fits: Callable[[Mapping[str, Sequence[str]]], bool],
    axes: Mapping[str, Mapping[str, Choice]],
    wrong: list[str],
) -> dict[str, Any]:
    """Fill in `summary` and `expect.*.where`, and drop the rows whose `when` does not fit the variant."""
    filled = dict(values)
    if isinstance(values.get("summary"), str):
        filled["summary"] = str(_filled(values["summary"], "summary", values, labels, wrong))
    if not isinstance(values.get("expect"), list):
        return filled
    rows = []
    for i, row in enumerate(values["expect"]):
        if not isinstance(row, Mapping):
            rows.append(row)  # the recipe's type says what is wrong with it
            continue
        rest = dict(row)
        entries = list(_entries(f"expect.{i}.when", rest.pop(_WHEN), axes, wrong)) if _WHEN in rest else [{}]
        if not any(fits(entry) for entry in entries):
            continue
        if isinstance(rest.get("where"), Mapping):
            rest["where"] = {
                key: _filled(value, f"expect.{i}.where.{key}", values, labels, wrong)
                for key, value in rest["where"].items()
            }
        rows.append(rest)
    return {**filled, "expect": rows}


def _filled(
    value: Any, place: str, known: Mapping[str, Any], labels: Mapping[str, str], wrong: list[str]
) -> Any:
    """A value with its references filled in; one that is a reference and nothing else keeps its type."""
    if not isinstance(value, str):
        return value
    found: dict[str, Any] = {}
    if "${" in _REFERENCE.sub("", value):
        wrong.append(f"'{place}': a reference has no end, or another one in it: {value}")
    for name in _REFERENCE.findall(value):
        target: Any = labels.get(name, known)
        for key in name.split(".") if name not in labels else ():
            target = target.get(key) if isinstance(target, Mapping) else None
        if isinstance(target, bool) or not isinstance(target, str | int | float):
            names = [*labels, *_scalars(known)]
            wrong.append(f"'{place}': '${{{name}}}' names no value{did_you_mean(name, names)}")
            continue
        found[name] = target
    if len(found) == 1 and value == f"${{{next(iter(found))}}}":
        return next(iter(found.values()))
    return _REFERENCE.sub(lambda match: str(found.get(match[1], match[0])), value)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all values that a reference may name."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}"
