"""The verbs `compile`, `repro`, `local` and `submit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpipe.contracts.errors import InputError
from vitpipe.verbs.options import (
    JsonOption,
    ParamsOption,
    ProfileOption,
    RecipeOption,
    SetOption,
    chosen_recipe,
)
from vitpipe.verbs.run_folders import check_run_place
from vitpipe.verbs.show import print_progress
from vitpipe.verbs.table import use_compiler

if TYPE_CHECKING:
    from vitpipe.tables.table_plan import TablePlan

# Every other import is inside a verb: `vitpipe --help` has a budget of 0.5 s of CPU time, kfp alone takes 3
# s.

PackageOption = Annotated[
    Path | None, typer.Option("--package", help="a compiled package  [default: compile one now]")
]
ArgumentOption = Annotated[
    list[str] | None, typer.Option("--argument", help="pipeline parameter NAME=VALUE, the value in YAML")
]
ImageOption = Annotated[
    list[str] | None,
    typer.Option("--image", help="train=REFERENCE or dense=REFERENCE, preferably with a digest"),
]
PlacementOption = Annotated[
    Path | None, typer.Option("--placement", help="YAML with a cluster's node labels, tolerations, volumes")
]

_BUILD = Path("build")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(name="compile")(compile_verb)
    app.command(name="repro")(repro_verb)
    app.command(name="local")(local_verb)
    app.command(name="submit")(submit_verb)
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


def local_verb(
    package: PackageOption = None,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    argument: ArgumentOption = None,
    out: Annotated[Path, typer.Option("--out", help="folder for runs")] = Path("artifacts/local"),
    data: Annotated[Path | None, typer.Option("--data", help="raw datasets, mounted read-only")] = None,
    dev: Annotated[bool, typer.Option("--dev", help="mount this checkout into a plain Debian image")] = False,
    shm_gib: Annotated[int, typer.Option("--shm-gib", min=1, help="size of /dev/shm, GiB")] = 2,
) -> None:
    """Run the compiled pipeline on this machine, each stage in a Docker container."""
    from pipelines.compile import compile_pipeline
    from pipelines.local import DEV_IMAGE, run_locally

    if package is None:
        # Not build/pipeline.yaml: that one, perhaps with a cluster's images, is what people submit.
        package = _BUILD / "pipeline-local.yaml"
        images: dict[Any, str] = {"train": DEV_IMAGE, "dense": DEV_IMAGE} if dev else {}
        compile_pipeline(*_chosen(recipe, profile, overrides, params), package, images=images)
    run = run_locally(
        package, root=out, arguments=_arguments(argument), data=data, shm_gib=shm_gib, development=dev
    )
    for stage, folder in run.outputs.items():
        print(f"{stage:12} {folder}")
    print(f"{'logs':12} {run.folder / 'logs'}")


def submit_verb(
    endpoint: Annotated[str, typer.Option("--endpoint", envvar="KF_PIPELINES_ENDPOINT", help="API address")],
    package: PackageOption = None,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    image: ImageOption = None,
    placement: PlacementOption = None,
    argument: ArgumentOption = None,
    experiment: Annotated[str, typer.Option(help="created when it does not exist")] = "vitpipe",
    namespace: Annotated[
        str | None, typer.Option(help="Kubernetes namespace, for a multi-user endpoint")
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="KFP_TOKEN", help="bearer token")] = None,
    service_account: Annotated[
        str | None, typer.Option(help="Kubernetes service account of the run's pods")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="wait for the end of the run; exit code 1 if it failed")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload the pipeline to a Kubeflow endpoint and start a run."""
    import dataclasses

    from pipelines.compile import compile_pipeline
    from pipelines.placement import read_placement
    from pipelines.submit import submit

    if package is None:
        package = _BUILD / "pipeline.yaml"
        images = _pairs(image, "--image", ("train", "dense"))
        nodes = read_placement(placement) if placement else None
        compile_pipeline(
            *_chosen(recipe, profile, overrides, params), package, images=images, placement=nodes
        )
    done = submit(
        package,
        endpoint,
        arguments=_arguments(argument),
        experiment=experiment,
        namespace=namespace,
        token=token,
        service_account=service_account,
        wait=wait,
    )
    print(json.dumps(dataclasses.asdict(done)) if as_json else f"{done.state}: {done.url}")


def _chosen(
    recipe: str | None, profile: str | None, overrides: list[str] | None, params: Path
) -> tuple[str, str, tuple[str, ...]]:
    """Recipe, profile and overrides from the command line, else from params.yaml."""
    chosen = chosen_recipe(recipe, profile, overrides, params)
    return chosen.recipe, chosen.profile, chosen.overrides


def _arguments(texts: list[str] | None) -> dict[str, Any]:
    import yaml

    from vitpipe.config.yaml_core import plain, read_yaml

    # YAML, because a pipeline parameter is typed: a list must arrive as a list, not as its text.
    arguments = {}
    for name, value in _pairs(texts, "--argument").items():
        try:
            arguments[name] = plain(read_yaml(value))
        except yaml.YAMLError as error:
            raise InputError(
                f"The value of '{name}' is not YAML",
                where="--argument",
                fix="quote text that contains special characters, for example overrides=['data.root=/a?b']",
            ) from error
    return arguments


def _pairs(texts: list[str] | None, option: str, known: tuple[str, ...] = ()) -> dict[Any, str]:
    """Parse `NAME=VALUE` texts into a mapping.

    Args:
        known: allowed names; all when empty.

    Raises:
        InputError: when a text is not of that form, or its name is not allowed or stands twice.
    """
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name or not value or (known and name not in known):
            names = f" with NAME one of {', '.join(known)}" if known else ""
            raise InputError(
                f"'{text}' is not of the form NAME=VALUE{names}",
                where=option,
                fix=f"write {option} NAME=VALUE",
            )
        if name in pairs:
            raise InputError(f"'{name}' is given twice", where=option, fix="give it once")
        pairs[name] = value
    return pairs
