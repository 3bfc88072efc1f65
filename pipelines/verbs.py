"""The verbs of the engines: `compile`, `local`, `submit`. kfp is imported when one of them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vitpipe.contracts.errors import InputError

RecipeOption = Annotated[str | None, typer.Option("--recipe", help="recipe name; params.yaml's if not given")]
ProfileOption = Annotated[str | None, typer.Option("--profile", help="demo, full, ...")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, may be repeated")]
ParamsOption = Annotated[Path, typer.Option("--params", help="file with recipe, profile, overrides")]
PackageOption = Annotated[Path | None, typer.Option("--package", help="a compiled package; else compile now")]
ArgumentOption = Annotated[
    list[str] | None, typer.Option("--argument", help="pipeline parameter NAME=VALUE, the value in YAML")
]
ImageOption = Annotated[
    list[str] | None, typer.Option("--image", help="train=REFERENCE or dense=REFERENCE, best with a digest")
]
PlacementOption = Annotated[
    Path | None, typer.Option("--placement", help="YAML with a cluster's node labels, tolerations, volumes")
]


_BUILD = Path("build")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(name="compile")(compile_verb)
    app.command(name="local")(local_verb)
    app.command(name="submit")(submit_verb)


def compile_verb(
    out: Annotated[Path, typer.Option("--out", help="package to write")] = _BUILD / "pipeline.yaml",
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    image: ImageOption = None,
    placement: PlacementOption = None,
    dvc: Annotated[bool, typer.Option("--dvc", help="write dvc.yaml instead of a package")] = False,
) -> None:
    """Write the recipe's graph for an engine: a Kubeflow package, or dvc.yaml."""
    if dvc:
        from pipelines.dvc import write_dvc
        from vitpipe.config.read import load_recipe
        from vitpipe.contracts.graph import graph_of

        loaded = load_recipe(*_chosen(recipe, profile, overrides, params))
        changed = write_dvc(graph_of(loaded.stages, loaded.start_from), Path("dvc.yaml"))
        print("dvc.yaml written" if changed else "dvc.yaml was right already")
        return
    from pipelines.compile import compile_pipeline
    from pipelines.placement import read_placement

    images = _pairs(image, "--image", ("train", "dense"))
    nodes = read_placement(placement) if placement else None
    chosen_names = _chosen(recipe, profile, overrides, params)
    package = compile_pipeline(*chosen_names, out, images=images, placement=nodes)
    print(f"{package.path}: pipeline {package.name}, stages {', '.join(package.stages)}")
    if package.images_without_digest:
        names = ", ".join(package.images_without_digest)
        print(f"Named by tag, so Kubeflow's cache will not see when they change: {names}")


def local_verb(
    package: PackageOption = None,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    argument: ArgumentOption = None,
    out: Annotated[Path, typer.Option("--out", help="folder for runs")] = Path("artifacts/local"),
    data: Annotated[Path | None, typer.Option("--data", help="raw datasets, mounted read-only")] = None,
    dev: Annotated[bool, typer.Option("--dev", help="mount this checkout into the plain image")] = False,
    shm_gib: Annotated[int, typer.Option("--shm-gib", min=1, help="size of /dev/shm, GiB")] = 2,
) -> None:
    """Run the compiled pipeline on this machine, every stage in its container."""
    from pipelines.compile import compile_pipeline
    from pipelines.local import DEV_IMAGE, run_locally

    if package is None:
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
    experiment: Annotated[str, typer.Option(help="made when missing")] = "vitpipe",
    namespace: Annotated[str | None, typer.Option(help="for an endpoint with many users")] = None,
    token: Annotated[str | None, typer.Option(envvar="KFP_TOKEN", help="bearer token")] = None,
    service_account: Annotated[str | None, typer.Option(help="of the run's pods")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="until the run has ended; exit 1 if it failed")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
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
    """Recipe, profile and overrides: the command line's, else those of params.yaml."""
    from vitpipe.config.read import choose

    chosen = choose(recipe, profile, overrides or (), params, default_profile="demo")
    return chosen.recipe, chosen.profile, chosen.overrides


def _arguments(texts: list[str] | None) -> dict[str, Any]:
    import yaml

    arguments = {}
    for name, value in _pairs(texts, "--argument").items():
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(
                f"The value of '{name}' is not YAML",
                where="--argument",
                fix="quote text that holds special characters, for example overrides=['data.root=/a?b']",
            ) from error
    return arguments


def _pairs(texts: list[str] | None, option: str, known: tuple[str, ...] = ()) -> dict[Any, str]:
    """`NAME=VALUE` texts as a mapping.

    Raises:
        InputError: when one is not of that form or its name is not known.
    """
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name or not value or (known and name not in known):
            names = f" with NAME one of {', '.join(known)}" if known else ""
            raise InputError(f"'{text}' is not of the form NAME=VALUE{names}", where=option, fix="correct it")
        pairs[name] = value
    return pairs
