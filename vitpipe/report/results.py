"""What a report is made of: the recipe of a run and the finished folders of its stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import Artifact, open_artifact
from vitpipe.contracts.errors import ArtifactError
from vitpipe.contracts.graph import Node, graph_of


@dataclass(frozen=True)
class RunResults:
    """One run: its recipe, and stage name -> finished folder (stages that did not run are absent)."""

    recipe: Recipe
    artifacts: dict[str, Artifact]

    @property
    def title(self) -> str:
        """Recipe, profile and seed."""
        return f"{self.recipe.name} · {self.recipe.profile} · seed {self.recipe.seed}"

    @property
    def wall_seconds(self) -> float:
        """Time of all stages together."""
        return sum(artifact.card.wall_seconds for artifact in self.artifacts.values())

    def nodes(self) -> tuple[Node, ...]:
        """The run's graph in running order."""
        return graph_of(self.recipe.stages, self.recipe.start_from)

    def stages(self) -> Iterator[tuple[str, Artifact]]:
        """Finished stages in running order."""
        for node in self.nodes():
            if node.name in self.artifacts:
                yield node.name, self.artifacts[node.name]

    def class_names(self) -> dict[str, str]:
        """Class key -> name for people (`n01440764` -> `tench`), from the data's table of classes."""
        prepared = self.artifacts.get("prepare")
        rows = prepared.tables().get("classes", []) if prepared else []
        return {row["class"]: row["name"] for row in rows if row.get("class") and row.get("name")}


@dataclass(frozen=True)
class Curve:
    """One learning curve of one stage: steps and values have the same length."""

    stage: str
    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def open_results(recipe: Recipe, folder: Path) -> RunResults:
    """The finished stages of `recipe` below `folder` (`artifacts/RECIPE/PROFILE`).

    Raises:
        ArtifactError: when none is there, or one is damaged.
    """
    names = [node.name for node in graph_of(recipe.stages, recipe.start_from)]
    found = {name: open_artifact(folder / name, name) for name in names if (folder / name).is_dir()}
    if not found:
        raise ArtifactError(
            "There is no finished stage in this folder",
            where=folder,
            fix="give a folder of a run, for example artifacts/itpn/pixel_base/demo",
        )
    return RunResults(recipe, found)


def labels(runs: Sequence[RunResults]) -> list[str]:
    """A short, unique name per run: whatever of recipe, profile and seed tells them apart."""
    parts = [(run.recipe.name, run.recipe.profile, f"seed {run.recipe.seed}") for run in runs]
    told_apart = [i for i in range(3) if len({part[i] for part in parts}) > 1] or [0]
    names = [" · ".join(part[i] for i in told_apart) for part in parts]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def curves(artifact: Artifact) -> list[Curve]:
    """Every name that a stage logged at two steps or more, from its table `history`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in artifact.tables().get("history", []):
        found.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return [
        Curve(artifact.card.stage, name, tuple(s for s, _ in points), tuple(v for _, v in points))
        for name, points in ((name, sorted(points)) for name, points in found.items())
        if len(points) > 1
    ]
