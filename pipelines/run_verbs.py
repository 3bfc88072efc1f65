"""The verbs `local` and `submit`: run a pipeline in this machine's Docker, or on a Kubeflow endpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.verb_options import (
    ArgumentOption,
    CaFileOption,
    ClientIdOption,
    CookiesOption,
    ExperimentOption,
    ImageOption,
    NamespaceOption,
    PackageOption,
    PlacementOption,
    ServiceAccountOption,
    TokenFileOption,
    TokenOption,
    arguments_of,
    chosen,
    pairs,
    refuse_beside,
)
from vitpipe.verbs.options import JsonOption, ParamsOption, ProfileOption, RecipeOption, SetOption
from vitpipe.verbs.run_folders import LOCAL_RUNS, check_run_place
from vitpipe.verbs.show import print_progress

if TYPE_CHECKING:
    from pipelines.local import LocalRun

# Every other import is inside a verb: `vitpipe --help` has a budget of 0.5 s of CPU time, kfp alone takes 3
# s.

_OF_PACKAGE = "compile a package with them, or leave --package out"


def local(
    package: PackageOption = None,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    image: ImageOption = None,
    argument: ArgumentOption = None,
    out: Annotated[Path, typer.Option("--out", help="folder for runs")] = LOCAL_RUNS,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="go on with this run, in its own folder")
    ] = None,
    no_reuse: Annotated[
        bool, typer.Option("--no-reuse", help="run also what an earlier run has finished")
    ] = False,
    data: Annotated[Path | None, typer.Option("--data", help="raw datasets, mounted read-only")] = None,
    dev: Annotated[bool, typer.Option("--dev", help="mount this checkout into a plain Debian image")] = False,
    shm_gib: Annotated[
        int | None, typer.Option("--shm-gib", min=1, help="size of /dev/shm, GiB  [default: 2]")
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", min=0.1, help="most memory of a container, GiB")
    ] = None,
) -> None:
    """Run the compiled pipeline on this machine, each stage in a Docker container.

    What an earlier run has finished with the same recipe values, code, image, data and inputs is taken over.
    """
    from pipelines.local import LocalOptions, resume_run, run_locally

    of_package = {"--recipe": recipe, "--profile": profile, "--set": overrides, "--image": image}
    if resume is not None:
        kept = {"--package": package, **of_package, "--argument": argument, "--data": data, "--dev": dev}
        kept["--out"] = out != LOCAL_RUNS
        fix = "start a new run with them: it takes over what they do not concern"
        refuse_beside("--resume", fix, kept)
        _show(resume_run(resume, shm_gib=shm_gib, memory_gib=memory, reuses=not no_reuse))
        return
    if package is not None:
        refuse_beside("--package", _OF_PACKAGE, {**of_package})
    check_run_place(out)
    options = LocalOptions(arguments_of(argument), data, shm_gib or 2, memory, dev)
    with _compiled(package, recipe, profile, overrides, params, image=image, dev=dev) as path:
        _show(run_locally(path, options, root=out, reuses=not no_reuse))


def _show(run: LocalRun) -> None:
    from pipelines.local import unsent_lines
    from vitpipe.contracts.shell import with_typed_commands
    from vitpipe.track.ui_address import ui_lines

    for stage, folder in run.outputs.items():
        print(f"{stage:12} {folder}")
    print(f"{'logs':12} {run.folder / 'logs'}")
    print(with_typed_commands(f"`vitpipe verdict {run.folder}` shows the verdict"))
    print("\n".join([*ui_lines(run.store.address), *unsent_lines(run.folder)]))


@contextmanager
def _compiled(
    package: Path | None,
    recipe: str | None,
    profile: str | None,
    overrides: list[str] | None,
    params: Path,
    *,
    image: list[str] | None,
    placement: Path | None = None,
    dev: bool = False,
    is_for_cluster: bool = False,
) -> Iterator[Path]:
    """The given package, else one that is compiled for this call alone: two calls must not share a file."""
    if package is not None:
        yield package
        return
    from pipelines.compile import compile_pipeline
    from pipelines.local_containers import DEV_IMAGE
    from pipelines.placement import read_placement

    images: dict[Any, str] = {"train": DEV_IMAGE, "dense": DEV_IMAGE} if dev else {}
    images |= pairs(image, "--image", ("train", "dense"))
    nodes = read_placement(placement) if placement else None
    with tempfile.TemporaryDirectory(prefix="vitpipe-package-") as folder:
        path = Path(folder) / "pipeline.yaml"
        made = compile_pipeline(
            *chosen(recipe, profile, overrides, params), path, images=images, placement=nodes
        )
        # What keeps a package from a cluster is of no interest here.
        for finding in made.findings if is_for_cluster else ():
            print_progress(f"{finding.what[0].upper()}{finding.what[1:]}. Fix: {finding.fix}.")
        yield path


def _service_account(placement: Path | None) -> str | None:
    """The account that the placement names for the run's pods."""
    from pipelines.placement import read_placement

    return read_placement(placement).service_account if placement is not None else None


def submit(
    endpoint: Annotated[str, typer.Option("--endpoint", envvar="KF_PIPELINES_ENDPOINT", help="API address")],
    package: PackageOption = None,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    image: ImageOption = None,
    placement: PlacementOption = None,
    argument: ArgumentOption = None,
    experiment: ExperimentOption = "vitpipe",
    namespace: NamespaceOption = None,
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    client_id: ClientIdOption = None,
    cookies: CookiesOption = None,
    ca_file: CaFileOption = None,
    service_account: ServiceAccountOption = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="wait for the end of the run; exit code 1 if it failed")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload the pipeline to a Kubeflow endpoint and start a run."""
    import dataclasses

    from pipelines.endpoint import Endpoint, Login
    from pipelines.submit import submit as send

    if package is not None:
        given = {"--recipe": recipe, "--profile": profile, "--set": overrides, "--image": image}
        refuse_beside("--package", _OF_PACKAGE, {**given, "--placement": placement})
    login = Login(token, token_file, client_id, cookies, ca_file)
    Endpoint.of(endpoint, login)  # before the seconds that compiling takes
    with _compiled(
        package, recipe, profile, overrides, params, image=image, placement=placement, is_for_cluster=True
    ) as path:
        done = send(
            path,
            endpoint,
            arguments=arguments_of(argument),
            experiment=experiment,
            namespace=namespace,
            login=login,
            service_account=service_account or _service_account(placement),
            wait=wait,
        )
    print(json.dumps(dataclasses.asdict(done)) if as_json else f"{done.state}: {done.url}")
