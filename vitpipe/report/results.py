"""Input of a report: the recipe of a run and the output folders of its finished stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vitpipe.config.recipe import Recipe
from vitpipe.config.set_names import dataset_of
from vitpipe.contracts.artifact import Artifact, open_artifact
from vitpipe.contracts.errors import ArtifactError
from vitpipe.contracts.files import is_empty
from vitpipe.contracts.graph import Node, graph_of
from vitpipe.prepare.set_summary import told_apart

REPORT = "report"
# What `RunResults.total_seconds` is, wherever it is shown.
TOTAL_TIME = "time of all stages but the report"
# The data, and the page itself.
_NO_RESULTS = ("prepare", REPORT)


_Judged = TypeVar("_Judged")


def once_per_run(function: Callable[[RunResults], _Judged]) -> Callable[[RunResults], _Judged]:
    """Compute what depends on a run alone once: page, text, tables and terminal ask for the same verdicts."""

    @functools.wraps(function)
    def kept(run: RunResults) -> _Judged:
        name = function.__qualname__
        if name not in run.known:
            run.known[name] = function(run)
        found: _Judged = run.known[name]
        return found

    return kept


@dataclass(frozen=True)
class RunResults:
    """One run: its recipe, and stage name -> output folder (stages that did not run are absent).

    Attributes:
        mismatches: stage -> why its output is not one of this recipe and these inputs, by its card.
        known: what `once_per_run` keeps.
    """

    recipe: Recipe
    artifacts: dict[str, Artifact]
    mismatches: Mapping[str, str] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def stage_seconds(self) -> dict[str, float]:
        """Wall time of each finished stage, seconds, in running order.

        Not of the report: a page that it writes itself cannot know it, and one run has one time on all pages.
        Without stages that DVC has fetched, whose times are not known.
        """
        return {
            name: artifact.run.wall_seconds
            for name, artifact in self.stages()
            if name != REPORT and artifact.run.wall_seconds
        }

    @property
    def total_seconds(self) -> float:
        """Sum of `stage_seconds`; 0 where the time of any of these stages is not known."""
        known = self.stage_seconds()
        return sum(known.values()) if set(known) == set(self.artifacts) - {REPORT} else 0.0

    def nodes(self) -> tuple[Node, ...]:
        """The stages of the recipe's graph in running order, also those that did not run."""
        return graph_of(self.recipe.stages, self.recipe.start_from)

    def stages(self) -> Iterator[tuple[str, Artifact]]:
        """Finished stages in running order."""
        for node in self.nodes():
            if node.name in self.artifacts:
                yield node.name, self.artifacts[node.name]

    def class_names(self, stage: str) -> dict[str, str]:
        """Class key -> readable name (`n01440764` -> `tench`) of the set that a stage reads.

        From the table `classes` of the data. Other sets may have the same keys: SVHN's are digits,
        Flowers-102's numbers.
        """
        prepared, dataset = self.artifacts.get("prepare"), dataset_of(self.recipe, stage)
        rows = prepared.tables().get("classes", []) if prepared else []
        pairs = [(row["class"], row.get("name", "")) for row in rows if row.get("dataset") == dataset]
        return told_apart(pairs)


@dataclass(frozen=True)
class Curve:
    """One learning curve of one stage: steps and values have the same length."""

    stage: str
    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def open_results(recipe: Recipe, folder: Path) -> RunResults:
    """Open the finished stages of `recipe` below `folder` (`artifacts/RECIPE/PROFILE`).

    Raises:
        ArtifactError: when there is no finished stage, or one is damaged.
    """
    # By the recipe's graph, not by the folders found: an earlier recipe may have left other stages there.
    names = [node.name for node in graph_of(recipe.stages, recipe.start_from)]
    outs = {name: folder / name for name in names if (folder / name).is_dir()}
    found = {name: open_artifact(out, name) for name, out in outs.items() if not is_empty(out)}
    if not found:
        raise ArtifactError(
            "There is no finished stage in this folder",
            where=folder,
            fix="give the folder of a run, for example artifacts/itpn/pixel_base/demo",
        )
    return RunResults(recipe, found)


def stages_by_interest(runs: Sequence[RunResults]) -> list[str]:
    """Stages with results: those that papers publish first, then the last ones of the pipeline."""
    claimed = [item.stage for run in runs for item in run.recipe.expect]
    found = [name for run in runs for name, _ in run.stages() if name not in _NO_RESULTS]
    order = [node.name for run in runs for node in run.nodes()]
    latest = sorted(dict.fromkeys(found), key=order.index, reverse=True)
    return [name for name in dict.fromkeys((*claimed, *latest)) if name in found]


def curves(artifact: Artifact) -> list[Curve]:
    """Learning curves of a stage: every metric of its table `history` with at least two steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in artifact.tables().get("history", []):
        found.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return [
        Curve(artifact.card.stage, name, tuple(s for s, _ in points), tuple(v for _, v in points))
        for name, points in ((name, sorted(points)) for name, points in found.items())
        if len(points) > 1  # one point draws no line; the final value is in the table of metrics
    ]
