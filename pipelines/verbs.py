"""The verbs `compile` and `repro`, and the registration of those that run a package (`run_verbs`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import run_verbs
from pipelines.verb_options import ImageOption, PlacementOption
from pipelines.verb_options import chosen as _chosen
from pipelines.verb_options import pairs as _pairs
from vitpipe.verbs.options import ParamsOption, ProfileOption, RecipeOption, SetOption
from vitpipe.verbs.run_folders import check_run_place
from vitpipe.verbs.show import print_progress
from vitpipe.verbs.table import use_compiler

if TYPE_CHECKING:
    from vitpipe.tables.table_plan import TablePlan

# Every other import is inside a verb: `vitpipe --help` has a budget of 0.5 s of CPU time, kfp alone takes 3
# s.

_BUILD = Path("build")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(name="compile")(compile_verb)
    app.command(name="repro")(repro_verb)
    app.command(name="local")(run_verbs.local)
    app.command(name="submit")(run_verbs.submit)
    use_compiler(_compile_table)


def _compile_table(plan: TablePlan) -> Path:
    """The package of a table's plan, below `build/`."""
    from pipelines.table import compile_table, table_pipeline_name

    return compile_table(plan, _BUILD / f"{table_pipeline_name(plan)}.yaml").path


def compile_verb(
    out: Annotated[Path, typer.Option("--out", help="package to write")] = _BUILD / "pipeline.yaml",
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    image: ImageOption = None,
    placement: PlacementOption = None,
    data_digest: Annotated[
        str, typer.Option(help="any text that changes with the raw data, for Kubeflow's cache")
    ] = "",
    release: Annotated[
        bool, typer.Option("--release", help="refuse a package that is not ready for a cluster")
    ] = False,
    start_from: Annotated[
        list[str] | None,
        typer.Option("--start-from", help="STAGE=ADDRESS of its finished output, which takes its place"),
    ] = None,
    dvc: Annotated[bool, typer.Option("--dvc", help="write dvc.yaml instead of a package")] = False,
) -> None:
    """Write the recipe's graph as a Kubeflow package, or as dvc.yaml."""
    if dvc:
        _write_dvc(_chosen(recipe, profile, overrides, params))
        return
    from pipelines.compile import compile_pipeline
    from pipelines.place import shown_tasks
    from pipelines.placement import Placement, read_placement
    from vitpipe.config.read import load_recipe, run_folder
    from vitpipe.verbs.show import print_rows

    images = _pairs(image, "--image", ("train", "dense"))
    cluster = read_placement(placement) if placement else Placement()
    chosen = _chosen(recipe, profile, overrides, params)
    check_run_place(run_folder(*chosen[:2]))
    package = compile_pipeline(
        *chosen,
        out,
        images=images,
        placement=cluster,
        data_digest=data_digest,
        release=release,
        imported=_pairs(start_from, "--start-from"),
    )
    print(f"{package.path}: pipeline {package.name}, stages {', '.join(package.stages)}")
    loaded = load_recipe(*chosen)
    if loaded.data.source != "embedded":
        print_rows(shown_tasks(loaded, cluster), False, right=("GPUs", "GPU-hours", "limit", "price"))
    for finding in package.findings:
        print(f"{finding.what[0].upper()}{finding.what[1:]}. Fix: {finding.fix}.")


def _write_dvc(chosen: tuple[str, str, tuple[str, ...]]) -> None:
    from pipelines.dvc import place_dependencies, write_dvc
    from vitpipe.config.read import load_recipe, run_folder
    from vitpipe.contracts.graph import graph_of
    from vitpipe.papers.published import check_expected
    from vitpipe.stages.identity import check_dvc_folder

    check_dvc_folder(Path.cwd())
    loaded = load_recipe(*chosen)
    loaded.data.require_root(f"recipe {loaded.name}, profile {loaded.profile}")
    check_expected(loaded)
    check_run_place(run_folder(*chosen[:2]))
    nodes = graph_of(loaded.stages, loaded.start_from)
    # No --out: DVC finds stages only in files of this name.
    changed = write_dvc(nodes, Path("dvc.yaml"))
    place_dependencies(nodes, run_folder(*chosen[:2]))
    print("dvc.yaml written" if changed else "dvc.yaml is up to date")


def repro_verb(
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="stages at the same time  [default: as the cores allow]"),
    ] = None,
) -> None:
    """Run what has changed by DVC, stages that do not need each other at the same time."""
    from pipelines.repro import jobs_for, repro
    from vitpipe.config.read import load_recipe, run_folder
    from vitpipe.contracts.graph import graph_of

    # The file that the commands in dvc.yaml read.
    chosen = _chosen(None, None, None, Path("params.yaml"))
    loaded = load_recipe(*chosen)
    check_run_place(run_folder(*chosen[:2]))
    loaded.data.require_root("params.yaml")
    repro(graph_of(loaded.stages, loaded.start_from), jobs or jobs_for(loaded), print_progress)
