"""What running a published table, or references, means: a run per recipe and seed, and what runs share.

Two stages of different runs are the same work when their identities and those of everything upstream are the
same. Such a stage runs once; the other runs read its folder. Data are prepared once for all seeds: what the
seeds vary is the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.digest import digest_of
from vitpipe.config.read import ARTIFACTS, load_recipe, run_folder
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.graph import Node, Stage, graph_of
from vitpipe.stages.identity import StageFolders, why_it_runs
from vitpipe.stages.run import identity_of, raw_data_of
from vitpipe.tables.claims import TableRow, claimed_rows, select_rows

# Each is planned, recipe by recipe: a million would take hours before the first message.
MAX_SEEDS = 1000


@dataclass(frozen=True)
class StageWork:
    """One stage of one run.

    Attributes:
        recipe: with the seed that the stage runs at; the data are prepared at the recipe's own.
        overrides: by which a process reads the same recipe.
        key: equal for two stages that do the same work on the same inputs.
        identity: as `identity_of`.
        raw_data: as `raw_data_of`.
    """

    node: Node
    recipe: Recipe
    overrides: tuple[str, ...]
    key: str
    identity: dict[str, str]
    raw_data: dict[str, str]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.node.name


@dataclass(frozen=True)
class TableRun:
    """One recipe at one seed: the stages that its claimed numbers need, in running order."""

    name: str
    recipe: Recipe
    folder: Path
    stages: dict[str, StageWork]

    @property
    def title(self) -> str:
        """Recipe and seed."""
        return f"{self.name}, seed {self.recipe.seed}"


@dataclass(frozen=True)
class RunPlan:
    """Runs that are started together.

    Attributes:
        title: what messages call all of them.
        runs: seeds of a recipe one after the other.
        folder: of the logs, and of what is written at the end; one process at a time works in it.
    """

    title: str
    profile: str
    num_seeds: int
    overrides: tuple[str, ...]
    runs: tuple[TableRun, ...]
    folder: Path

    def runs_of(self, name: str) -> tuple[TableRun, ...]:
        """The runs of a recipe, one per seed."""
        return tuple(run for run in self.runs if run.name == name)

    def started_runs(self) -> Iterator[tuple[TableRun, tuple[StageWork, ...]]]:
        """The runs with the stages of them that are wanted."""
        for run in self.runs:
            yield run, tuple(run.stages.values())


@dataclass(frozen=True)
class TablePlan(RunPlan):
    """A published table at a profile; its runs are those of all claimed rows, in the order of the rows.

    Attributes:
        rows: all rows of the table.
        selected: those whose runs are started.
        conditions: by which they were selected, as `plan_table` takes them.
    """

    paper: str
    number: str
    rows: tuple[TableRow, ...]
    selected: tuple[TableRow, ...]
    conditions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the command line names the table."""
        return f"{self.paper}/{self.number}"

    def started_runs(self) -> Iterator[tuple[TableRun, tuple[StageWork, ...]]]:
        """The runs of the selected rows with the stages that these rows need."""
        wanted = _wanted(self.selected)
        for run in self.runs:
            names = _with_upstream(wanted.get(run.name, set()), [work.node for work in run.stages.values()])
            if names:
                yield run, tuple(work for work in run.stages.values() if work.name in names)


def plan_table(
    paper: str,
    number: str,
    profile: str,
    *,
    num_seeds: int = 1,
    overrides: Sequence[str] = (),
    conditions: Sequence[str] = (),
    root: Path = ARTIFACTS,
) -> TablePlan:
    """Plan the runs of a table; starts nothing.

    Args:
        overrides: of every recipe, `section.key=value`.
        conditions: `KEY=VALUE`, which rows to run; all without.
        root: the folder of all runs.

    Raises:
        RecipeError, InputError: as `claimed_rows` and `select_rows`.
    """
    rows = claimed_rows(paper, number, profile, overrides)
    selected = select_rows(rows, conditions)
    wanted = _wanted(rows)
    recipes = {claim.name: claim.recipe for row in rows for claim in row.claims}
    return TablePlan(
        title=f"table {paper}/{number}",
        profile=profile,
        num_seeds=num_seeds,
        overrides=tuple(overrides),
        runs=plan_runs(recipes, wanted, num_seeds, overrides, root),
        folder=root / "tables" / f"{paper}-{number}" / profile,
        paper=paper,
        number=number,
        rows=rows,
        selected=selected,
        conditions=tuple(conditions),
    )


def plan_runs(
    recipes: Mapping[str, Recipe],
    wanted: Mapping[str, set[str]],
    num_seeds: int,
    overrides: Sequence[str],
    root: Path,
) -> tuple[TableRun, ...]:
    """One run per recipe and seed: the recipe's own seed and the next ones.

    Args:
        recipes: name, as the command line takes it -> recipe, read with `overrides`.
        wanted: name -> the stages whose numbers are wanted.
        root: the folder of all runs.

    Raises:
        InputError: there are more seeds than anybody runs.
    """
    if num_seeds > MAX_SEEDS:
        raise InputError(
            f"{num_seeds:.12g} runs of each recipe are too many",
            where="--seeds",
            fix=f"give at most {MAX_SEEDS:,}",
        )
    scans = _Scans()
    return tuple(
        _run(name, recipe, recipe.seed + k, wanted[name], tuple(overrides), root, scans)
        for name, recipe in recipes.items()
        for k in range(num_seeds)
    )


def _wanted(rows: Sequence[TableRow]) -> dict[str, set[str]]:
    """Recipe -> the stages whose numbers these rows compare."""
    wanted: dict[str, set[str]] = {}
    for row in rows:
        for claim in row.claims:
            wanted.setdefault(claim.name, set()).add(claim.expectation.stage)
    return wanted


class _Scans:
    """`raw_data_of` for many recipes: the same folders are listed once, which takes seconds for ImageNet."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, str]] = {}

    def raw_data(self, recipe: Recipe, stage: Stage) -> dict[str, str]:
        """As `raw_data_of`."""
        if "data" not in stage.sections:
            return raw_data_of(recipe, stage)
        key = digest_of(recipe.data)
        if key not in self._known:
            self._known[key] = raw_data_of(recipe, stage)
        return self._known[key]


def _run(
    name: str,
    recipe: Recipe,
    seed: int,
    wanted: set[str],
    overrides: tuple[str, ...],
    root: Path,
    scans: _Scans,
) -> TableRun:
    is_first = seed == recipe.seed
    seeded = overrides if is_first else (*overrides, f"seed={seed}")
    own = recipe if is_first else load_recipe(name, recipe.profile, seeded)
    nodes = graph_of(recipe.stages, recipe.start_from)
    stages: dict[str, StageWork] = {}
    for node in nodes:
        if node.name not in _with_upstream(wanted, nodes):
            continue
        # The seed of the data would only re-run the packing: nothing in it is drawn but the contact sheet.
        of_data = node.stage.kind == "Dataset"
        read = recipe if of_data else own
        identity = identity_of(read, node.stage)
        upstream = {key: stages[feeder].key for key, feeder in node.inputs.items()}
        work = digest_of({"identity": identity["identity"], "inputs": upstream})
        texts = overrides if of_data else seeded
        stages[node.name] = StageWork(node, read, texts, work, identity, scans.raw_data(read, node.stage))
    # The first seed lies where `dvc repro` and `vitpipe run` have the recipe.
    profile = recipe.profile if is_first else f"{recipe.profile}-seed{seed}"
    return TableRun(name, own, run_folder(name, profile, root), stages)


def _with_upstream(wanted: set[str], nodes: Sequence[Node]) -> set[str]:
    """The named stages and all that feed them, directly or not."""
    found: set[str] = set()
    for node in reversed(nodes):
        if node.name in wanted or node.name in found:
            found |= {node.name, *node.inputs.values()}
    return found


class FinishedStages:
    """Finds the finished output of a run's stage: its own, else that of another run with the same work.

    An output is read where it lies and never changed. It counts only if its card says the present identity
    and the very inputs that were found for it.
    """

    def __init__(self, runs: Sequence[TableRun]) -> None:
        self._by_key: dict[str, list[tuple[TableRun, StageWork]]] = {}
        for run in runs:
            for work in run.stages.values():
                self._by_key.setdefault(work.key, []).append((run, work))
        self._found: dict[tuple[Path, str], Path] = {}

    def folder(self, run: TableRun, stage: str) -> Path | None:
        """The finished output; None when the stage has to run."""
        found = self._own(run, run.stages[stage])
        if found is None:
            others = (self._own(other, work) for other, work in self._by_key[run.stages[stage].key])
            found = next((folder for folder in others if folder is not None), None)
        return found

    def inputs(self, run: TableRun, stage: str) -> dict[str, Path] | None:
        """Input name -> finished folder; None when one of them is missing."""
        found = {name: self.folder(run, feeder) for name, feeder in run.stages[stage].node.inputs.items()}
        complete = {name: folder for name, folder in found.items() if folder is not None}
        return complete if len(complete) == len(found) else None

    def _own(self, run: TableRun, work: StageWork) -> Path | None:
        place = (run.folder, work.name)
        if place not in self._found:
            # What is not finished is looked for again: this process, or another one, may finish it.
            out = run.folder / work.name
            inputs = self.inputs(run, work.name) if out.is_dir() else None
            if inputs is None or why_it_runs(
                work.node, StageFolders(inputs, out), work.identity, work.raw_data
            ):
                return None
            self._found[place] = out
        return self._found[place]
