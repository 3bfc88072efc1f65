"""Why a result cannot be compared with a published row: derived from the facts of its run.

A published row is claimed by a recipe, ours or a plugin's, as its file stands at profile `full`. A run is
compared with the row only where everything that its number depends on is the same there: the stages that
lead to it, every acting recipe value, the network, the data as they were prepared, which have to be those of
the catalogue, and how the number was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitpipe.config.read import load_recipe, recipe_files, recipe_values, variant_names
from vitpipe.config.recipe import Expectation, Recipe
from vitpipe.config.set_names import dataset_of
from vitpipe.config.yaml_core import plain
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.discovery import PACKAGE
from vitpipe.contracts.errors import RecipeError, some
from vitpipe.contracts.files import read_text
from vitpipe.contracts.graph import Node, graph_of
from vitpipe.datasets.catalogue import FACTS, DatasetFacts, class_order
from vitpipe.papers.published import find_row
from vitpipe.report.protocol_ledger import differences_in, ledger_of
from vitpipe.report.recipe_differences import acting_values, chain_of, differences, edges_of
from vitpipe.report.results import RunResults

PROFILE = "full"
# What the summary of many verdicts says; `Reason.text` has the facts.
Kind = Literal["other data", "other network", "other settings", "other stages", "other protocol", "unknown"]
# Costs of a network: no training and no image changes them, only the network and its number of classes.
COSTS = {"params", "gmacs"}
# How a step is divided and what it keeps in memory: results agree to rounding (docs/reversible.md, and the
# tests of micro-batches), and no paper has these values.
_MACHINE = {"micro_batch", "memory_mode", "reversible_autocast"}
_NUM_NAMED = 2  # of the values that differ; of a demo dozens do
_AS_IN_SOURCE = "as in the source"
# A set's row in the table `splits` of `prepare`: dataset, split -> that row.
Splits = Mapping[tuple[str, str], Mapping[str, str]]


@dataclass(frozen=True)
class Reason:
    """One reason: its kind, and the facts as text."""

    kind: Kind
    text: str


def published_recipe(recipe: Recipe, expectation: Expectation) -> Recipe | Reason:
    """The recipe of a published row: the one that claims it, at profile `full`, without overrides.

    One of ours goes before the run's own: a file of the user's may be a copy of ours with other values, and
    then claims the same rows.

    Args:
        recipe: of the run.
        expectation: one of its own.
    """
    names = [recipe.name] if _is_ours(recipe.name) else _claiming(recipe, expectation)
    try:
        found = [_as_published(name) if _is_ours(name) else load_recipe(name, PROFILE) for name in names]
    except RecipeError:
        return Reason("unknown", f"the recipe {' or '.join(names)} cannot be read at profile {PROFILE}")
    if not found:
        return Reason(
            "unknown", "no recipe of vitpipe or of a plugin claims this row: its settings are unknown"
        )
    # Several recipes may claim one number: the nearest one tells best what is different.
    sections = [node for node in graph_of(recipe.stages, recipe.start_from) if node.name != "prepare"]
    mine = acting_values(recipe, sections)
    return min(found, key=lambda other: len(differences(mine, acting_values(other, sections))))


@functools.lru_cache(maxsize=256)  # each published number of a run asks for it; files of the package stay
def _as_published(name: str) -> Recipe:
    return load_recipe(name, PROFILE)


def _is_ours(name: str) -> bool:
    """Whether a recipe's name is one of the package's; `mine.yaml` and those of plugins are not."""
    file = "/".join(name.split("/")[:2])  # what follows are variants
    path = recipe_files().get(file)
    return path is not None and path.is_relative_to(PACKAGE) and name in variant_names(file)


def _claiming(recipe: Recipe, expectation: Expectation) -> list[str]:
    """Names of the recipes that claim a row: ours, else those of plugins."""
    paper = recipe.source.paper
    row = find_row(paper, expectation.where)
    found: dict[bool, list[str]] = {True: [], False: []}
    for name, claimed in _claims_of(paper, tuple(recipe_files().items())):
        if row in claimed and _can_be_read(name):
            found[_is_ours(name)].append(name)
    return found[True] or found[False]


@functools.lru_cache(maxsize=8)  # one verdict asks for each of its rows
def _claims_of(
    paper: str, files: tuple[tuple[str, Path], ...]
) -> tuple[tuple[str, tuple[dict[str, Any], ...]], ...]:
    """Names of all recipes of a paper, with the published rows that each claims.

    By the values of their files: validating some hundred recipes takes seconds, and few claim the row that
    is asked for. What cannot be read, a plugin's file, is left out: whoever runs it is told.

    Args:
        files: as `recipe_files`; only those that name the paper are read as recipes.
    """
    found = []
    for file, path in files:
        try:
            names = variant_names(file) if paper in read_text(path) else ()
        except (OSError, UnicodeDecodeError, RecipeError):
            continue
        for name in names:
            with suppress(RecipeError):
                values = plain(recipe_values(name, PROFILE))
                if _paper_of(values) == paper:
                    found.append((name, tuple(_rows_of(paper, values.get("expect")))))
    return tuple(found)


def _paper_of(values: Mapping[str, Any]) -> Any:
    source = values.get("source")
    return source.get("paper") if isinstance(source, Mapping) else None


def _rows_of(paper: str, expect: Any) -> Iterator[dict[str, Any]]:
    for item in expect if isinstance(expect, list) else ():
        where = item.get("where") if isinstance(item, Mapping) else None
        if isinstance(where, Mapping):
            with suppress(RecipeError):  # said when the recipe itself is checked
                yield find_row(paper, where)


def _can_be_read(name: str) -> bool:
    try:
        load_recipe(name, PROFILE)
    except RecipeError:
        return False
    return True


def reasons_of(run: RunResults, expectation: Expectation, published: Recipe | Reason) -> tuple[Reason, ...]:
    """Why the run's number must not be compared with the row of an expectation; empty when it may.

    Args:
        published: as `published_recipe`.
    """
    if isinstance(published, Reason):
        return (published,)
    chain = chain_of(run.nodes(), expectation.stage)
    is_cost = expectation.metric in COSTS
    found = [*_data_reasons(run, chain, is_cost)]
    found += _recipe_reasons(run.recipe, published, chain, expectation)
    ledger = ledger_of(expectation, run.artifacts.get(expectation.stage))
    if other := differences_in(ledger):
        found.append(Reason("other protocol", some(other)))
    found += [Reason("unknown", run.mismatches[node.name]) for node in chain if node.name in run.mismatches]
    return tuple(found)


def _recipe_reasons(
    recipe: Recipe, published: Recipe, chain: list[Node], expectation: Expectation
) -> Iterator[Reason]:
    theirs = chain_of(graph_of(published.stages, published.start_from), expectation.stage)
    shared = [node for node in chain if node.name in {other.name for other in theirs}]
    differing = differences(acting_values(recipe, shared), acting_values(published, shared))
    changed = {key: text for key, text in differing.items() if key.rpartition(".")[2] not in _MACHINE}
    network = {key: text for key, text in changed.items() if key.startswith("model.")}
    if network:
        # Name and size first: what else differs usually follows from them.
        named = sorted(network, key=lambda key: (key != "model.name", key != "model.image_size", key))
        yield Reason("other network", some([network[key] for key in named], _NUM_NAMED))
    if expectation.metric in COSTS:
        return
    if edges_of(chain) != edges_of(theirs):
        here, there = (", ".join(node.name for node in nodes) for nodes in (chain, theirs))
        yield Reason("other stages", f"the stages are {here or 'none'}, not {there or 'none'}")
    others = sorted(key for key in changed if not key.startswith("model."))
    # The length of a training first, which readers look for.
    others.sort(key=lambda key: not key.endswith((".epochs", ".steps")))
    if settings := [changed[key] for key in others]:
        yield Reason("other settings", some(settings, _NUM_NAMED))


def _data_reasons(run: RunResults, chain: list[Node], is_cost: bool) -> Iterator[Reason]:
    prepared = run.artifacts.get("prepare")
    if prepared is None:
        # Where the stage itself has not run either, that is reason enough.
        if chain and chain[-1].name in run.artifacts:
            yield Reason("unknown", "the data are unknown: the output of prepare is not here")
        return
    # The cost of a network depends on the classes of the set that it was trained for.
    nodes = [node for node in chain if node.name != "prepare"]
    sets = dict.fromkeys(name for node in nodes if (name := dataset_of(run.recipe, node.name)))
    if is_cost:
        own = dataset_of(run.recipe, chain[-1].name) if chain else None
        sets = {own: None} if own else {}
    splits = {(row["dataset"], row["split"]): row for row in prepared.tables().get("splits", [])}
    for name in sets:
        if name not in FACTS:
            continue  # a set of the user's own: nothing is published of it
        text = _classes_text(name, splits) if is_cost else _set_text(name, prepared, splits)
        if text:
            origin = " (embedded)" if run.recipe.data.source == "embedded" else ""
            yield Reason("other data", f"{name}{origin} {text}")


def _classes_text(name: str, splits: Splits) -> str:
    known = FACTS[name].num_classes
    row = splits.get((name, "val"))
    if row is None:
        return "is not among the prepared sets"
    num_classes = int(row["num_classes"])
    return f"has {num_classes:,} classes, not {known:,}" if known and num_classes != known else ""


def _set_text(name: str, prepared: Artifact, splits: Splits) -> str:
    """What is otherwise in the prepared set than in the published one; empty where nothing is."""
    if not all((name, split) in splits for split in ("train", "val")):
        return "is not among the prepared sets"
    train, val = (int(splits[name, split]["num_images"]) for split in ("train", "val"))
    num_classes = int(splits[name, "val"]["num_classes"])
    source = next((row for row in prepared.tables().get("sources", []) if row["dataset"] == name), {})
    if not _has_published_size(FACTS[name], train, val, num_classes, _num_left_out(prepared)):
        known = FACTS[name]
        return (
            f"has {train:,} training and {val:,} validation images of {num_classes:,} classes, not "
            f"{known.num_train_images:,} and {known.num_val_images:,} of {known.num_classes:,}"
        )
    if other := _other_classes(name, prepared):
        return f"has other classes than {FACTS[name].title}: {other}"
    if (encoding := source.get("encoding", _AS_IN_SOURCE)) != _AS_IN_SOURCE:
        return f"was packed with smaller images: {encoding}"
    return ""


def _has_published_size(known: DatasetFacts, train: int, val: int, num_classes: int, left_out: int) -> bool:
    sizes = [(known.num_train_images, known.num_val_images, known.num_classes)]
    sizes += [(r.num_train_images, r.num_val_images, r.num_classes) for r in known.releases]
    published = [size for size in sizes if size[0]]
    # Unreadable training images are left out and listed; a validation set has to be whole. A set without one,
    # as ImageNet-22K, has ours held out of its training images.
    return not published or any(
        num_classes == of
        and val == (num_val or val)
        and num_train - left_out <= (train if num_val else train + val) <= num_train
        for num_train, num_val, of in published
    )


def _num_left_out(prepared: Artifact) -> int:
    return int(prepared.metrics.get("num_corrupt", 0))


def _other_classes(name: str, prepared: Artifact) -> str:
    """`class 0 is 'a', not 'n01440764'` where the order of classes is known and another one; else empty."""
    wanted = class_order(name)
    keys = [row["class"] for row in prepared.tables().get("classes", []) if row["dataset"] == name]
    if len(keys) != len(wanted):  # another release of the set, whose order is not listed
        return ""
    pairs = enumerate(zip(keys, wanted, strict=True))
    return next((f"class {i} is '{here}', not '{there}'" for i, (here, there) in pairs if here != there), "")
