"""What the runs of a report are called: by what they differ in; and which are one run at several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpipe.config.digest import recipe_sections
from vitpipe.config.recorded import recorded_values
from vitpipe.config.telling_values import flat_values, short_keys, short_text, telling_order
from vitpipe.report.recipe_differences import acting_values, chain_of, edges_of
from vitpipe.report.results import RunResults

_NAMED = 3  # differences that a label spells out; a column's head has no room for more
_SHOWN_DIGITS = 8
# Where data lie decides nothing about what was prepared of them, whose digest is compared.
_PLACES = ("data.root", "data.store")


def labels(runs: Sequence[RunResults]) -> list[str]:
    """A short, unique label per run: `epochs 2`, `itpn/pixel_base · seed 1`, from what the runs differ in.

    Runs of one recipe and profile are told apart by their values, the most telling ones first, then by their
    data and code; by a number only where nothing differs.
    """
    names = [(run.recipe.name, run.recipe.profile) for run in runs]
    shared = [len({name[i] for name in names}) == 1 for i in range(2)]
    found: dict[int, str] = {}
    for name in dict.fromkeys(names):
        group = [i for i, other in enumerate(names) if other == name]
        front = [part for part, is_shared in zip(name, shared, strict=True) if not is_shared]
        for i, parts in zip(group, _differing([runs[i] for i in group]), strict=True):
            found[i] = " · ".join([*front, *parts])
    texts = [found[i] or runs[i].recipe.name for i in range(len(runs))]
    return [
        f"{text} ({texts[: i + 1].count(text)})" if texts.count(text) > 1 else text
        for i, text in enumerate(texts)
    ]


def _differing(runs: Sequence[RunResults]) -> list[list[str]]:
    """For each of several runs of one recipe, the values that it does not share with all others."""
    values = [{**flat_values(recorded_values(run.recipe)), **_origin(run)} for run in runs]
    differing = [
        key
        for key in dict.fromkeys(key for own in values for key in own)
        if any(own.get(key) != values[0].get(key) for own in values)
    ]
    deciding = {key for run in runs for key in flat_values(run.recipe.acting(on_weights_only=True))}
    ordered = telling_order([key for key in differing if key not in _ORIGIN], deciding)
    shown = ordered[:_NAMED]
    # Beyond these only what still tells two runs apart. Data and code come last: the seeds of one recipe are
    # mostly run over several commits.
    for key in [*ordered[_NAMED:], *(key for key in differing if key in _ORIGIN)]:
        told = [tuple(short_text(own.get(name)) for name in shown) for own in values]
        longer = [(*parts, short_text(own.get(key))) for parts, own in zip(told, values, strict=True)]
        if len(set(longer)) > len(set(told)):
            shown.append(key)
    words = short_keys([*ordered, *_ORIGIN])
    hidden = len([key for key in ordered if key not in shown])
    return [
        [f"{words[key]} {short_text(own.get(key))}" for key in shown] + ([f"{hidden} more"] if hidden else [])
        for own in values
    ]


_ORIGIN = ("data digest", "commit")


def _origin(run: RunResults) -> dict[str, str]:
    """The data and the code of a run, as far as its stages agree on them."""
    found: dict[str, set[str]] = {name: set() for name in _ORIGIN}
    for _, artifact in run.stages():
        found["data digest"].add(artifact.card.data_digest[:_SHOWN_DIGITS])
        found["commit"].add(artifact.run.git_commit[:_SHOWN_DIGITS])
    return {name: ",".join(sorted(values)) for name, values in found.items()}


def are_seeds_of_one(runs: Sequence[RunResults], stage: str) -> bool:
    """Whether a stage's results are those of one recipe at several seeds, so that they have a mean.

    All recipe values that act on the stage, its data and what feeds it are equal, and no seed occurs twice.
    """
    seeds = [run.recipe.seed for run in runs]
    return len(runs) > 1 and len(set(seeds)) == len(seeds) and len(_made_alike(runs, stage)) == 1


def repetitions(runs: Sequence[RunResults]) -> list[list[str]]:
    """Labels of runs that have the same recipe values and the same seed, in groups of at least two."""
    found: dict[str, list[str]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        acting = {"name": run.recipe.name, "profile": run.recipe.profile, **run.recipe.acting()}
        found.setdefault(repr(sorted(flat_values(acting).items())), []).append(label)
    return [names for names in found.values() if len(names) > 1]


def _made_alike(runs: Sequence[RunResults], stage: str) -> list[Any]:
    """The different ways in which runs have made a stage, the seed aside."""
    found: list[Any] = []
    for run in runs:
        chain = chain_of(run.nodes(), stage)
        artifact = run.artifacts.get(stage)
        mismatch = next((run.mismatches[node.name] for node in chain if node.name in run.mismatches), "")
        data = flat_values(recipe_sections(run.recipe, ["data"], on_weights_only=True))
        made = (
            (run.recipe.name, run.recipe.profile),
            edges_of(chain),
            acting_values(run.recipe, chain),
            {key: value for key, value in data.items() if key not in _PLACES},
            artifact.card.data_digest if artifact else None,
            # Of an output that is not one of the run's recipe nobody knows how it was made.
            (mismatch, id(run)) if mismatch else None,
        )
        if made not in found:
            found.append(made)
    return found
